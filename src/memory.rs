//! How much freed memory the allocator keeps.

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

/// Gives freed memory back to the system. Takes milliseconds; after work that needed much more than what follows.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes the allocator's own locks, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
