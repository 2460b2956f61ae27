//! What time it is, asked once for each turn of a task.
//!
//! A request notes about nine moments, nearly all of them in two turns of its task, each of which lasts microseconds: asking
//! the clock for each of them took a fortieth of the program's own time. Who waits for a moment to be over asks the
//! clock itself: within one turn this time does not pass.

use std::{
    cell::Cell,
    time::{Duration, Instant, SystemTime},
};

#[derive(Clone, Copy)]
enum Turn {
    /// Not in a turn: nothing is kept.
    Outside,
    /// Nobody has asked yet.
    Begun,
    Asked(Instant),
}

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn::Outside) };
    /// One moment by both clocks.
    static WALL: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
}

/// For how long the distance between the clocks is believed: the wall's may be set.
const BELIEVED: Duration = Duration::from_secs(1);

/// Runs one turn of a task, in which [`now`] stays what it is when it is first asked.
pub(crate) fn turn<R>(run: impl FnOnce() -> R) -> R {
    struct Ends;
    impl Drop for Ends {
        fn drop(&mut self) {
            TURN.set(Turn::Outside);
        }
    }
    TURN.set(Turn::Begun);
    let _ends = Ends;
    run()
}

/// When this turn asked first; outside of a turn, now.
pub(crate) fn now() -> Instant {
    match TURN.get() {
        Turn::Asked(at) => at,
        Turn::Begun => {
            let at = Instant::now();
            TURN.set(Turn::Asked(at));
            at
        }
        Turn::Outside => Instant::now(),
    }
}

/// Something took long, a script for instance: who asks next asks the clock.
pub(crate) fn passed() {
    if let Turn::Asked(_) = TURN.get() {
        TURN.set(Turn::Begun);
    }
}

/// What the clock on the wall shows at `at`, a moment that has just been asked for.
pub(crate) fn wall(at: Instant) -> SystemTime {
    if let Some((known, shown)) = WALL.get()
        && let Some(since) = at.checked_duration_since(known)
        && since < BELIEVED
    {
        return shown + since;
    }
    let shown = SystemTime::now();
    WALL.set(Some((at, shown)));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_still_within_a_turn() {
        let tick = || {
            let begun = Instant::now();
            while Instant::now() == begun {}
        };
        let (first, last) = turn(|| {
            let first = now();
            tick();
            (first, now())
        });
        assert_eq!(first, last);
        let after_something_long = turn(|| {
            let first = now();
            tick();
            passed();
            now() > first
        });
        assert!(after_something_long);
        let outside = now();
        tick();
        assert!(now() > outside && outside > last);
    }

    #[test]
    fn the_wall_follows_the_moments() {
        let at = Instant::now();
        let shown = wall(at);
        assert_eq!(wall(at + BELIEVED / 2), shown + BELIEVED / 2);
        // Asked anew: the test's later moment has not come yet, so the clock shows less than it would.
        assert!(wall(at + BELIEVED) < shown + BELIEVED);
    }
}
