//! The Mersenne Twister of 32 bits (Matsumoto and Nishimura 1998), for orders that must be the same everywhere.

/// The generator, seeded as C++'s `std::mt19937`.
pub(super) struct Mt19937 {
    state: [u32; N],
    at: usize,
}

impl Mt19937 {
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [seed; N];
        for index in 1..N {
            let last = state[index - 1];
            state[index] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(index as u32);
        }
        Self { state, at: N }
    }

    fn next(&mut self) -> u32 {
        if self.at == N {
            self.twist();
        }
        let mut bits = self.state[self.at];
        self.at += 1;
        bits ^= bits >> 11;
        bits ^= (bits << 7) & 0x9d2c_5680;
        bits ^= (bits << 15) & 0xefc6_0000;
        bits ^ (bits >> 18)
    }

    /// A number in `0..limit`, as Envoy draws it; `limit` is at least 1.
    pub(super) fn below(&mut self, limit: u32) -> u32 {
        let width = (1u64 << 32) / u64::from(limit.max(1));
        loop {
            let number = (u64::from(self.next()) / width) as u32;
            if number < limit.max(1) {
                return number;
            }
        }
    }

    fn twist(&mut self) {
        for index in 0..N {
            let bits =
                (self.state[index] & 0x8000_0000) | (self.state[(index + 1) % N] & 0x7fff_ffff);
            let odd = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[index] = self.state[(index + 397) % N] ^ (bits >> 1) ^ odd;
        }
        self.at = 0;
    }
}

const N: usize = 624;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_thousandth_number_is_the_standard_s() {
        // ISO C++, [rand.predef]: with the default seed 5489.
        let mut random = Mt19937::new(5489);
        let last = (0..10_000).map(|_| random.next()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
