//! What memory the process keeps that it does not need: freed blocks, and code that only its start ran.

/// Bounds the allocator's arenas by the processors, of which glibc would make eight times as many: each thread that waits
/// for a disk would keep what it once needed. Before the first thread starts.
pub fn bound_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let arenas = libc::c_int::try_from(processors.max(2)).unwrap_or(libc::c_int::MAX);
        // SAFETY: it sets a number, and is called while there is one thread. Where it is refused the default stays.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
}

/// Gives freed memory back to the system, and code that was read for the start. Takes milliseconds; after work that needed
/// much more than what follows.
pub fn give_back() {
    give_back_code();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes the allocator's own locks, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps the pages of the program's code. Those that run again are mapped again, mostly from the system's cache; argument
/// parsing, configuration and whatever else only a start needs stay out.
fn give_back_code() {
    // Where it cannot be read, nothing is given back.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (begin, length) in maps.lines().filter_map(code) {
        // SAFETY: the mapping is private, of a file, and was never writable, so no page of it differs from the file's,
        // which the system reads again when it is needed.
        unsafe { libc::madvise(begin as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Where a mapping begins and its length, if it is code of a file: a line of proc_pid_maps(5).
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (begin, end) = fields.next()?.split_once('-')?;
    let (permissions, path) = (fields.next()?, fields.nth(3)?);
    let (begin, end) = (usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (permissions == "r-xp" && path.starts_with('/')).then(|| (begin, end.saturating_sub(begin)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_given_back() {
        let code_of_a_file =
            "55d43b000000-55d43b003000 r-xp 00001000 fe:00 4711                       /usr/local/bin/jwksd";
        assert_eq!(code(code_of_a_file), Some((0x55d4_3b00_0000, 0x3000)));
        for other in [
            // Relocated pointers, read-only by now, that the file does not have.
            "55d43b003000-55d43b004000 r--p 00003000 fe:00 4711                       /usr/local/bin/jwksd",
            "55d43b004000-55d43b005000 rw-p 00004000 fe:00 4711                       /usr/local/bin/jwksd",
            "7f0000000000-7f0000001000 r-xp 00000000 00:00 0",
            "7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0                          [vdso]",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn the_process_goes_on_without_its_code() {
        let resident = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
            let mut of_code = false;
            let sizes = smaps.lines().filter_map(|line| {
                let mapping = line.split_ascii_whitespace().next()?.contains('-');
                of_code = if mapping { code(line).is_some() } else { of_code };
                let kilobytes = line.strip_prefix("Rss:").filter(|_| of_code)?;
                kilobytes.trim().strip_suffix(" kB")?.parse::<u64>().ok()
            });
            sizes.sum::<u64>()
        };
        // Tests beside this one map code at the same time.
        let shrank = (0..100).any(|_| {
            let before = resident();
            give_back();
            resident() < before
        });
        assert!(shrank, "{} kB of code stay", resident());
    }
}
