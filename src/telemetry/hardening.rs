//! Keeps the memory of the process, which holds private keys, out of core dumps and away from debuggers of the same
//! user.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Turns core dumps off for good and makes the process undumpable (prctl(2), PR_SET_DUMPABLE): no core file, no
/// ptrace and no reading of `/proc/PID/mem` by other processes of the same user. Call it before any key is read.
///
/// # Errors
/// The kernel refused; the process should not go on to handle keys.
pub fn harden() -> Result<(), HardeningError> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|e| HardeningError { operation: "limit core dumps", source: e.into() })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| HardeningError { operation: "make the process undumpable", source: e.into() })
}

/// The process could not be protected.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}: look for a seccomp profile that forbids prctl or setrlimit, and allow both")]
pub struct HardeningError {
    operation: &'static str,
    source: std::io::Error,
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
