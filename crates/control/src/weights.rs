//! Weights as they may go out.

/// Makes the sum of weights fit into 32 bits, in proportion; none becomes 0 that was not. `weight`: that of an element, or
/// none where it does not count among them.
///
/// Proxies refuse a larger sum, and with it everything that came in the same message: one user's weights would keep all
/// routes of a port, or all endpoints of a service, from changing.
pub(crate) fn fit<T>(all: &mut [T], weight: impl Fn(&mut T) -> Option<&mut u32>) {
    let (mut sum, mut count) = (0_u64, 0_u64);
    for weight in all.iter_mut().filter_map(&weight).filter(|w| **w > 0) {
        sum += u64::from(*weight);
        count += 1;
    }
    if sum <= u64::from(u32::MAX) {
        return;
    }
    // Each may be rounded up to 1.
    let room = u64::from(u32::MAX).saturating_sub(count);
    for weight in all.iter_mut().filter_map(&weight).filter(|w| **w > 0) {
        let share = u128::from(*weight) * u128::from(room) / u128::from(sum);
        *weight = u32::try_from(share).unwrap_or(u32::MAX).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(mut weights: Vec<u32>) -> Vec<u32> {
        fit(&mut weights, |weight| Some(weight));
        weights
    }

    #[test]
    fn shares_stay_and_the_sum_fits() {
        assert!(fitted(vec![]).is_empty());
        assert_eq!(fitted(vec![80, 20, 0]), [80, 20, 0]);
        assert_eq!(fitted(vec![u32::MAX]), [u32::MAX]);
        assert_eq!(fitted(vec![u32::MAX, 1]), [u32::MAX - 3, 1]);
        let half = fitted(vec![u32::MAX, u32::MAX, 0]);
        assert_eq!((half[0], half[2]), (half[1], 0));
        let sum = |weights: Vec<u32>| weights.into_iter().map(u64::from).sum::<u64>();
        assert!(sum(half) <= u64::from(u32::MAX));
        assert!(sum(fitted(vec![u32::MAX; 1000])) <= u64::from(u32::MAX));
    }
}
