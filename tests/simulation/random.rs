//! Randomness that a seed repeats.

/// SplitMix64: one number of state, good enough to choose what happens.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Mixed, or neighbouring seeds would draw from one sequence, some numbers apart.
        Random(mix(mix(seed ^ 0x1234_5678)))
    }

    /// A seed nobody chose.
    pub fn from_system() -> u64 {
        use std::hash::{BuildHasher, Hasher};
        std::collections::hash_map::RandomState::new().build_hasher().finish() % 1_000_000_000
    }

    /// Another sequence, which what is drawn from this one does not change.
    #[allow(dead_code, reason = "tests/whole.rs alone draws from several")]
    pub fn fork(&mut self) -> Self {
        Random::new(self.next())
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// 0 to `bound` - 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
