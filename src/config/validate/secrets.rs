//! Where secrets are to be found: in one file, or in one environment variable.

use std::path::PathBuf;

use crate::config::SecretSource;
use crate::config::problem::Report;

/// The keys of a table that say where its secret is.
pub(super) struct SecretKeys {
    pub(super) file: &'static str,
    pub(super) env: &'static str,
    /// What the secret is, in messages.
    pub(super) noun: &'static str,
    /// A variable that could hold it, in messages.
    pub(super) example: &'static str,
    /// Keys that were refused already, with the advice that would be given here.
    pub(super) inline: &'static [&'static str],
}

/// A token beside other things.
pub(super) const TOKEN: SecretKeys = SecretKeys {
    file: "token_file",
    env: "token_env",
    noun: "the token",
    example: "JWKSD_TOKEN",
    inline: &["token", "secret", "password"],
};

/// Exactly one of `file` and `env`.
pub(super) fn secret(
    table: &str,
    keys: &SecretKeys,
    file: Option<PathBuf>,
    env: Option<String>,
    report: &mut Report,
) -> Option<SecretSource> {
    match (file, env) {
        (Some(file), None) => Some(SecretSource::File(file)),
        (None, Some(name)) => variable(&format!("{table}.{}", keys.env), keys.example, name, report),
        (Some(_), Some(_)) => {
            report.refuse(table, format_args!("has both `{}` and `{}`: choose one", keys.file, keys.env));
            None
        }
        (None, None) => {
            let mut reported = [keys.file, keys.env].into_iter().chain(keys.inline.iter().copied());
            if !reported.any(|key| report.is_broken(&format!("{table}.{key}"))) {
                report.refuse(
                    table,
                    format_args!(
                        "says not where {} is: name its file in `{}`, or an environment variable in `{}`",
                        keys.noun, keys.file, keys.env
                    ),
                );
            }
            None
        }
    }
}

fn variable(path: &str, example: &str, name: String, report: &mut Report) -> Option<SecretSource> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.len() > 128 || !name.chars().all(legal) || name.starts_with(|c: char| c.is_ascii_digit()) {
        // Not quoted: somebody may have put the secret itself here.
        report.refuse(path, format_args!("is not the name of an environment variable, such as {example}"));
        return None;
    }
    if name.starts_with(crate::config::ENVIRONMENT_PREFIX) {
        report.refuse(
            path,
            format_args!("{name} would be taken for a setting: use a name that does not begin with JWKSD__"),
        );
        return None;
    }
    Some(SecretSource::Environment(name))
}
