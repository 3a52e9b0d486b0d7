//! Arguments of a measuring program: numbers, and options with a value.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use super::Outcome;

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<String>,
    options: BTreeMap<String, String>,
}

impl Arguments {
    /// Those of this process; every option is one of `known` and has a value.
    pub fn read(known: &[&str]) -> Outcome<Self> {
        let mut arguments = Arguments::default();
        let mut given = std::env::args().skip(1);
        while let Some(argument) = given.next() {
            match argument.strip_prefix("--") {
                Some(name) if known.contains(&name) => {
                    let value = given.next().ok_or_else(|| format!("--{name} wants a value"))?;
                    arguments.options.insert(name.to_owned(), value);
                }
                Some(name) => return Err(format!("--{name} is not known; there are: --{}", known.join(", --")).into()),
                None => arguments.positional.push(argument),
            }
        }
        Ok(arguments)
    }

    pub fn option<T: FromStr>(&self, name: &str, default: T) -> Outcome<T> {
        match self.options.get(name) {
            None => Ok(default),
            Some(value) => value.parse().map_err(|_| format!("--{name} {value} cannot be read").into()),
        }
    }

    /// `--binary PATH`, or the one that `benches/run` names in the environment.
    pub fn binary(&self) -> Outcome<PathBuf> {
        let built = std::env::var_os("JWKSD_BENCH_BINARY").unwrap_or_default();
        let binary = self.option("binary", PathBuf::from(built))?;
        Ok(binary.canonicalize().map_err(|error| format!("{}: {error}", binary.display()))?)
    }
}
