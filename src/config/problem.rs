//! What is wrong with a configuration: everything at once, each with its config path.

use std::collections::{HashMap, HashSet};
use std::fmt;

/// Something about one place of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The config path (`keyset.default.rotation.propagation`), or the environment variable that was not understood.
    pub path: String,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// More problems than this are counted, not listed.
const MOST_PROBLEMS: usize = 500;

/// A message lists at most so many words to choose from.
const MOST_LISTED: usize = 40;

/// Of thousands of names only so many are compared with a misspelt one.
const MOST_COMPARED: usize = 1000;

/// Longer words are not compared.
const LONGEST_SUGGESTED: usize = 64;

/// Collects problems while the configuration is read and validated.
#[derive(Debug, Default)]
pub(super) struct Report {
    problems: Vec<Problem>,
    unlisted: usize,
    warnings: Vec<Problem>,
    /// Paths whose value could not be used; so that "missing" and sums over them are not reported on top.
    broken: HashSet<String>,
    /// Which environment variable set a path.
    overrides: HashMap<String, String>,
}

impl Report {
    /// The value at `path` is wrong.
    pub(super) fn refuse(&mut self, path: impl fmt::Display, message: impl fmt::Display) {
        let path = path.to_string();
        let message = match self.overrides.get(&path) {
            Some(variable) => format!("{message} (set by {variable})"),
            None => message.to_string(),
        };
        self.broken.insert(path.clone());
        self.list(Problem { path, message });
    }

    /// As [`refuse`](Self::refuse), for what several keysets share and would each report.
    pub(super) fn refuse_once(&mut self, path: impl fmt::Display, message: impl fmt::Display) {
        let path = path.to_string();
        if !self.is_broken(&path) {
            self.refuse(path, message);
        }
    }

    /// There is no such key at `path`; nothing else depends on it.
    pub(super) fn unknown(&mut self, path: impl fmt::Display, key: &str, known: &[&str]) {
        self.list(Problem { path: path.to_string(), message: format!("unknown key; {}", suggest(key, known)) });
    }

    /// `path` must be given, unless what stands there was already refused.
    pub(super) fn require<T>(&mut self, path: impl fmt::Display, value: Option<T>, advice: &str) -> Option<T> {
        let path = path.to_string();
        if value.is_none() && !self.is_broken(&path) {
            self.refuse(path, format_args!("missing: {advice}"));
        }
        value
    }

    pub(super) fn warn(&mut self, path: impl fmt::Display, message: impl fmt::Display) {
        if self.warnings.len() < MOST_PROBLEMS {
            self.warnings.push(Problem { path: path.to_string(), message: message.to_string() });
        }
    }

    /// As [`warn`](Self::warn), for what several keysets share and would each report.
    pub(super) fn warn_once(&mut self, path: impl fmt::Display, message: impl fmt::Display) {
        let warning = Problem { path: path.to_string(), message: message.to_string() };
        if !self.warnings.contains(&warning) {
            self.warn(warning.path, warning.message);
        }
    }

    /// `variable` sets `path`; the variable that did so before, if any.
    pub(super) fn overridden(&mut self, path: String, variable: String) -> Option<String> {
        self.overrides.insert(path, variable)
    }

    /// What stands at `path` cannot be used, for reasons already reported.
    pub(super) fn break_silently(&mut self, path: impl fmt::Display) {
        self.broken.insert(path.to_string());
    }

    /// The paths whose values cannot be used.
    pub(super) fn broken_paths(&self) -> impl Iterator<Item = &str> {
        self.broken.iter().map(String::as_str)
    }

    /// Whether the value at `path` was refused.
    pub(super) fn is_broken(&self, path: &str) -> bool {
        self.broken.contains(path)
    }

    pub(super) fn finish(self) -> Outcome {
        Outcome { problems: self.problems, unlisted: self.unlisted, warnings: self.warnings }
    }

    fn list(&mut self, problem: Problem) {
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.unlisted += 1;
        }
    }
}

/// What was collected.
pub(super) struct Outcome {
    pub(super) problems: Vec<Problem>,
    pub(super) unlisted: usize,
    pub(super) warnings: Vec<Problem>,
}

/// A place in the tree, written out only when something is wrong there.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    parent: Option<&'a At<'a>>,
    segment: Segment<'a>,
}

#[derive(Clone, Copy)]
enum Segment<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> At<'a> {
    pub(super) const ROOT: At<'static> = At { parent: None, segment: Segment::Key("") };

    pub(super) fn key(&'a self, key: &'a str) -> At<'a> {
        At { parent: Some(self), segment: Segment::Key(key) }
    }

    pub(super) fn index(&'a self, index: usize) -> At<'a> {
        At { parent: Some(self), segment: Segment::Index(index) }
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(parent) = self.parent else { return f.write_str("the whole file") };
        if parent.parent.is_some() {
            parent.fmt(f)?;
        }
        match self.segment {
            Segment::Index(index) => write!(f, "[{index}]"),
            Segment::Key(key) => {
                if parent.parent.is_some() {
                    f.write_str(".")?;
                }
                write_key(f, key)
            }
        }
    }
}

/// Keys of the file appear in messages: bare ones as they are, others quoted, escaped and cut.
fn write_key(f: &mut fmt::Formatter<'_>, key: &str) -> fmt::Result {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !key.is_empty() && key.len() <= 64 && key.chars().all(bare) {
        f.write_str(key)
    } else {
        write!(f, "{:?}", key.chars().take(64).collect::<String>())
    }
}

/// "did you mean `x`?" where one of `known` is near, else what there is to choose from.
pub(super) fn suggest(given: &str, known: &[&str]) -> String {
    if let Some(candidate) = nearest(given, known.iter().copied()) {
        return format!("did you mean `{candidate}`?");
    }
    if known.is_empty() {
        return "there is nothing to choose from".to_owned();
    }
    let listed: Vec<_> = known.iter().take(MOST_LISTED).map(|k| format!("`{k}`")).collect();
    let more = if known.len() > MOST_LISTED { ", …" } else { "" };
    format!("known here: {}{more}", listed.join(", "))
}

/// What was probably meant.
pub(super) fn nearest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if given.len() > LONGEST_SUGGESTED {
        return None;
    }
    let plain = |text: &str| text.to_ascii_lowercase().replace('_', "-");
    let given = plain(given);
    known
        .take(MOST_COMPARED)
        .filter(|candidate| candidate.len() <= LONGEST_SUGGESTED)
        .map(|candidate| (edit_distance(&given, &plain(candidate)), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 5)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that lead from one text to the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_misses_are_recognised_and_far_ones_listed() {
        let known = ["propagation", "successors", "every"];
        for near in ["propagaton", "propagations", "Propagation", "prpoagation"] {
            assert_eq!(suggest(near, &known), "did you mean `propagation`?", "{near}");
        }
        assert_eq!(suggest("evry", &known), "did you mean `every`?");
        assert_eq!(suggest("colour", &known), "known here: `propagation`, `successors`, `every`");
    }

    #[test]
    fn strange_keys_are_quoted_and_cut_in_paths() {
        let table = At::ROOT.key("keyset");
        assert_eq!(table.key("a\nb").to_string(), "keyset.\"a\\nb\"");
        assert_eq!(table.key("").to_string(), "keyset.\"\"");
        assert!(table.key(&"x".repeat(9999)).to_string().len() < 100);
        assert_eq!(table.key("list").index(2).to_string(), "keyset.list[2]");
    }

    #[test]
    fn an_unlimited_number_of_problems_is_counted_not_kept() {
        let mut report = Report::default();
        for n in 0..MOST_PROBLEMS + 7 {
            report.refuse(n, "wrong");
        }
        let outcome = report.finish();
        assert_eq!((outcome.problems.len(), outcome.unlisted), (MOST_PROBLEMS, 7));
    }
}
