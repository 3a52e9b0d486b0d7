//! Keeps the memory of the process, which holds private keys, out of core dumps and away from debuggers of the same
//! user.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Makes the process undumpable (prctl(2), PR_SET_DUMPABLE), and turns core dumps off for good. Call it before any key is
/// read.
///
/// The first is what protects: no core is written whatever the limit says or `core_pattern` pipes to (core(5)), and other
/// processes of the same user cannot attach with ptrace or read `/proc/PID/mem`. The limit is a second line: it is
/// inherited, and holds should something make the process dumpable again. So a process that cannot be made undumpable must
/// not handle keys; one whose limit cannot be set may.
///
/// # Errors
/// The kernel refused one of them; [`is_fatal`](HardeningError::is_fatal) tells which.
pub fn harden() -> Result<(), HardeningError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|source| HardeningError::Dumpable(source.into()))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|source| HardeningError::CoreLimit(source.into()))
}

/// The process could not be protected as it should be.
#[derive(Debug, thiserror::Error)]
pub enum HardeningError {
    #[error(
        "the memory of the process, which holds private keys, cannot be kept out of core dumps and debuggers: allow \
         prctl(PR_SET_DUMPABLE) in the seccomp profile"
    )]
    Dumpable(#[source] std::io::Error),
    #[error(
        "core dumps cannot be limited: allow setrlimit(RLIMIT_CORE) in the seccomp profile. The process is undumpable all the same"
    )]
    CoreLimit(#[source] std::io::Error),
}

impl HardeningError {
    /// Whether the process must not go on to handle keys.
    pub fn is_fatal(&self) -> bool {
        matches!(self, HardeningError::Dumpable(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardened_process_leaves_no_core_dump_and_can_still_read_its_own_proc() {
        harden().unwrap();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        // An undumpable process's files in /proc belong to root; the process metrics still need these two.
        assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() > 0);
        assert!(!std::fs::read_to_string("/proc/self/stat").unwrap().is_empty());
        harden().unwrap();
    }
}
