//! Chance that a seed repeats.

/// SplitMix64: one number of state, good enough to choose what happens.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Mixed, or neighbouring seeds would draw from one sequence, some numbers apart.
        Random(mix(mix(seed ^ 0x1234_5678)))
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// 0 to `bound` - 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }

    /// Uniform from `low` to `high`, both included; `low` where they are the wrong way round.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        if high <= low {
            return low;
        }
        low + i64::try_from(self.below(high.abs_diff(low).saturating_add(1))).unwrap_or(0)
    }

    /// From 0 to `most`, mostly one of its ends: what goes wrong goes wrong there.
    pub fn extreme(&mut self, most: i64) -> i64 {
        match self.below(5) {
            0 => 0,
            1..=3 => most,
            _ => self.between(0, most),
        }
    }

    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
