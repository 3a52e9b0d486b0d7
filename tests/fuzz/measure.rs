//! What one thread costs: its processor's time, whatever else the machine does, and the memory it holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// From a moment on, of this thread.
pub struct Measured {
    nanos: u64,
    held: isize,
}

impl Measured {
    pub fn begin() -> Self {
        MOST.set(HELD.get());
        Measured { nanos: on_processor(), held: HELD.get() }
    }

    pub fn millis(&self) -> u64 {
        (on_processor() - self.nanos) / 1_000_000
    }

    /// The most bytes held at once beyond those held at the beginning; since the last beginning.
    pub fn most_bytes(&self) -> usize {
        usize::try_from(MOST.get() - self.held).unwrap_or(0)
    }
}

/// Nanoseconds, as the scheduler counts them.
fn on_processor() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells of each thread");
    text.split(' ').next().and_then(|nanos| nanos.parse().ok()).expect("nanoseconds come first")
}

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: the system's allocator does all of it; what is counted beside it allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // No allocation is larger than isize::MAX. Less than nothing is held where another thread allocated what this one freed.
        let held = HELD.get() + layout.size() as isize;
        HELD.set(held);
        MOST.set(MOST.get().max(held));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}
