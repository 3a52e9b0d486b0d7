//! From a source and the environment to a [`Config`], or to everything that is wrong.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::keyring::timing::{Finding, Severity};

use super::problem::{Outcome, Problem, Report};
use super::raw::{Field, Root};
use super::value::{Format, Value};
use super::watch::ContentDigest;
use super::{Config, env, validate};

/// The configuration used when there is no file: `config/jwksd.toml` as it was built in.
pub const EMBEDDED: &str = include_str!("../../config/jwksd.toml");

/// Where a configuration is looked for when none is named, in this order.
pub const SEARCHED: [&str; 2] = ["config/jwksd.toml", "/etc/jwksd/jwksd.toml"];

/// A configuration file is at most this long, in bytes (10,000 keysets take about 3 MB).
const LONGEST_FILE: u64 = 16 * 1024 * 1024;

/// Where a configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    /// [`EMBEDDED`].
    Embedded,
    /// A text that is at hand, and what to call it in messages.
    Text {
        name: String,
        text: String,
        format: Format,
    },
}

/// A valid configuration and what else is to be said about it.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    /// Where it came from, for messages.
    pub origin: String,
    /// The file it came from and its content, for [`Watch`](super::Watch); `None` when it was not a file.
    pub file: Option<(PathBuf, ContentDigest)>,
    /// Advice; timing warnings included.
    pub warnings: Vec<Problem>,
    /// Timing that is refused: by `check`, for new keysets, and as a reason to run a keyset degraded.
    pub timing: Vec<Finding>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigErrors {
    #[error("cannot read the configuration {}; name another one with --config", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{origin}: not valid {format}, line {line}, column {column}: {message}")]
    Syntax { origin: String, format: Format, line: usize, column: usize, message: String },
    #[error("{0}")]
    Invalid(Invalid),
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct Invalid {
    pub origin: String,
    pub problems: Vec<Problem>,
    /// How many more problems there are.
    pub unlisted: usize,
    /// Refused timing of the keysets that could be understood.
    pub timing: Vec<Finding>,
    pub warnings: Vec<Problem>,
}

impl Source {
    /// `--config`, else `$JWKSD_CONFIG`, else the first file of [`SEARCHED`] that exists, else the embedded default.
    pub fn find(flag: Option<&Path>, variable: Option<&str>) -> Source {
        Source::find_among(flag, variable, &SEARCHED.map(Path::new))
    }

    /// As [`find`](Self::find) with other places to search.
    pub fn find_among(flag: Option<&Path>, variable: Option<&str>, searched: &[&Path]) -> Source {
        let named = flag.or_else(|| variable.filter(|text| !text.is_empty()).map(Path::new));
        // A file that cannot be looked at is taken, and its error reported: unreadable is not absent.
        let existing = || searched.iter().copied().find(|path| path.try_exists().unwrap_or(true));
        named.or_else(existing).map_or(Source::Embedded, |path| Source::File(path.to_owned()))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(path) => path.display().fmt(f),
            Source::Embedded => f.write_str("the built-in configuration"),
            Source::Text { name, .. } => f.write_str(name),
        }
    }
}

/// Reads `source`, puts the overrides among `environment` (all variables may be passed) over it and validates the whole.
pub fn load(source: &Source, environment: impl Iterator<Item = (String, String)>) -> Result<Loaded, ConfigErrors> {
    let origin = source.to_string();
    let (text, format, file) = read(source)?;
    let mut tree = Value::parse(&text, format).map_err(|error| ConfigErrors::Syntax {
        origin: origin.clone(),
        format,
        line: error.line,
        column: error.column,
        message: error.message,
    })?;
    let mut report = Report::default();
    env::apply(&mut tree, &Root::SHAPE, environment, &mut report);
    let root = Root::read(tree, &super::problem::At::ROOT, &mut report);
    let validated = root.map(|root| validate::root(root, &mut report)).unwrap_or_default();

    let outcome = report.finish();
    let (refused, advised): (Vec<_>, Vec<_>) =
        validated.timing.into_iter().partition(|finding| finding.severity == Severity::Refused);
    let mut warnings = outcome.warnings;
    warnings.extend(advised.iter().map(|f| Problem { path: f.path(), message: f.message.clone() }));
    match validated.config {
        Some(config) if outcome.problems.is_empty() => Ok(Loaded { config, origin, file, warnings, timing: refused }),
        _ => {
            let Outcome { problems, unlisted, .. } = outcome;
            Err(ConfigErrors::Invalid(Invalid { origin, problems, unlisted, timing: refused, warnings }))
        }
    }
}

/// One line per problem.
impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len() + self.unlisted + self.timing.len();
        let noun = if count == 1 { "problem" } else { "problems" };
        write!(f, "{}: {count} {noun}", self.origin)?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        if self.unlisted > 0 {
            write!(f, "\n  … and {} more", self.unlisted)?;
        }
        for finding in &self.timing {
            write!(f, "\n  {finding}")?;
        }
        Ok(())
    }
}

type Content = (String, Format, Option<(PathBuf, ContentDigest)>);

fn read(source: &Source) -> Result<Content, ConfigErrors> {
    match source {
        Source::Embedded => Ok((EMBEDDED.to_owned(), Format::Toml, None)),
        Source::Text { text, format, .. } => Ok((text.clone(), *format, None)),
        Source::File(path) => {
            let text =
                read_file(path).map_err(|error| ConfigErrors::Unreadable { path: path.clone(), source: error })?;
            let digest = ContentDigest::of(text.as_bytes());
            Ok((text, Format::of(path), Some((path.clone(), digest))))
        }
    }
}

fn read_file(path: &Path) -> io::Result<String> {
    let refuse = |message: &str| Err(io::Error::new(io::ErrorKind::InvalidData, message));
    if !std::fs::metadata(path)?.is_file() {
        return refuse("it is not a regular file");
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LONGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST_FILE {
        return refuse("it is longer than 16 MiB");
    }
    String::from_utf8(bytes).or_else(|_| refuse("it is not UTF-8 text"))
}
