//! Secrets that come from outside: read once, compared in constant time, never shown.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A secret file is at most this long, in bytes; tokens and keys are far shorter.
pub const LONGEST_SECRET: usize = 16 * 1024;

/// Bytes that are wiped when dropped and that `Debug` does not show. Equality takes the same time whatever differs.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret(Vec<u8>);

/// A secret as read from a file, and what is dubious about that file.
#[derive(Debug)]
pub struct SecretFile {
    pub secret: Secret,
    /// Why others may know it: sentences for the log, with the file's name.
    pub warnings: Vec<String>,
}

impl Secret {
    /// `bytes` without one newline at the end; refused when nothing is left or it is too long.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretProblem> {
        let trimmed = bytes.strip_suffix(b"\n").map_or(bytes, |b| b.strip_suffix(b"\r").unwrap_or(b));
        if trimmed.is_empty() {
            Err(SecretProblem::Empty)
        } else if trimmed.len() > LONGEST_SECRET {
            Err(SecretProblem::TooLong)
        } else {
            Ok(Secret(trimmed.to_vec()))
        }
    }

    /// Reads the secret in the file at `path` (a symbolic link is followed, as Kubernetes mounts secrets by links).
    pub fn read_file(path: &Path) -> Result<SecretFile, SecretError> {
        let wrong = |problem| SecretError::File { path: path.to_owned(), problem };
        let metadata = std::fs::metadata(path).map_err(|error| wrong(SecretProblem::Unreadable(error)))?;
        if !metadata.is_file() {
            return Err(wrong(SecretProblem::NotAFile));
        }
        // Room for all of it at once: a buffer that grows leaves copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(LONGEST_SECRET + 3));
        File::open(path)
            .and_then(|file| file.take(LONGEST_SECRET as u64 + 3).read_to_end(&mut bytes))
            .map_err(|error| wrong(SecretProblem::Unreadable(error)))?;
        let secret = Secret::new(&bytes).map_err(wrong)?;
        Ok(SecretFile { secret, warnings: loose_mode(path, metadata.mode()).into_iter().collect() })
    }

    /// The secret in the environment variable `name`, whose value the caller looked up.
    pub fn from_env(name: &str, value: Option<String>) -> Result<Self, SecretError> {
        let wrong = |problem| SecretError::Variable { name: name.to_owned(), problem };
        let value = Zeroizing::new(value.ok_or_else(|| wrong(SecretProblem::Unset))?);
        Secret::new(value.as_bytes()).map_err(wrong)
    }

    /// The bytes themselves, for the one place that needs them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Whether `presented` is this secret, in a time that does not tell how much of it is right, nor how long it is.
    pub fn matches(&self, presented: &[u8]) -> bool {
        Sha256::digest(&self.0).as_slice().ct_eq(Sha256::digest(presented).as_slice()).into()
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.matches(&other.0)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A secret that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("cannot use the secret file {}: {problem}", path.display())]
    File { path: PathBuf, problem: SecretProblem },
    #[error("cannot use the secret in the environment variable {name}: {problem}")]
    Variable { name: String, problem: SecretProblem },
}

/// Why.
#[derive(Debug, thiserror::Error)]
pub enum SecretProblem {
    #[error("it is empty; write the secret into it")]
    Empty,
    #[error("it is longer than {LONGEST_SECRET} bytes; is it the right one?")]
    TooLong,
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is not set")]
    Unset,
    #[error("{0}")]
    Unreadable(io::Error),
}

/// A sentence about a file whose mode lets everyone read it.
pub(super) fn loose_mode(path: &Path, mode: u32) -> Option<String> {
    (mode & 0o004 != 0).then(|| {
        let path = path.display();
        format!("everyone on this machine may read {path} (mode {:04o}): run `chmod 0600 {path}`", mode & 0o7777)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (folder, path)
    }

    #[test]
    fn one_newline_at_the_end_does_not_belong_to_the_secret() {
        for (content, secret) in
            [("s3cret", "s3cret"), ("s3cret\n", "s3cret"), ("s3cret\r\n", "s3cret"), ("a\n\n", "a\n")]
        {
            let (_folder, path) = file(content.as_bytes(), 0o600);
            let read = Secret::read_file(&path).unwrap();
            assert_eq!(read.secret.expose(), secret.as_bytes());
            assert!(read.warnings.is_empty());
        }
    }

    #[test]
    fn files_that_hold_no_secret_are_refused_by_name() {
        for content in [&b""[..], b"\n", b"\r\n", &[b'x'; LONGEST_SECRET + 2]] {
            let (_folder, path) = file(content, 0o600);
            let error = Secret::read_file(&path).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            Secret::read_file(folder.path()),
            Err(SecretError::File { problem: SecretProblem::NotAFile, .. })
        ));
        assert!(matches!(
            Secret::read_file(&folder.path().join("none")),
            Err(SecretError::File { problem: SecretProblem::Unreadable(_), .. })
        ));
        assert!(Secret::from_env("TOKEN", None).unwrap_err().to_string().contains("TOKEN: it is not set"));
    }

    #[test]
    fn a_file_everyone_may_read_is_used_with_a_warning() {
        let (_folder, path) = file(b"s3cret", 0o644);
        let read = Secret::read_file(&path).unwrap();
        assert!(read.warnings[0].contains("mode 0644"), "{:?}", read.warnings);
    }

    #[test]
    fn a_secret_equals_itself_only_and_does_not_show() {
        let secret = Secret::new(b"s3cret").unwrap();
        assert!(secret.matches(b"s3cret"));
        for other in [&b""[..], b"s3creT", b"s3cre", b"s3cret "] {
            assert!(!secret.matches(other));
        }
        assert_eq!(format!("{secret:?}"), "Secret(…)");
    }
}
