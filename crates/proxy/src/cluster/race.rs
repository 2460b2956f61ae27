//! Connecting to a host that has several addresses (happy eyeballs, RFC 8305): one after the other, families in turn, the
//! next as soon as the one before has failed or taken 300 ms; the first that is there wins.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use crate::plan::Address;

/// Races connections to the addresses, the best of which comes first. What loses is dropped.
pub(super) async fn race<'a, T, F>(
    addresses: impl Iterator<Item = &'a Address>,
    connect: impl Fn(&'a Address) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>> + 'a,
{
    let mut waiting = in_turn(addresses);
    let mut running: Vec<Pin<Box<dyn Future<Output = io::Result<T>> + 'a>>> = Vec::new();
    let mut failure = None;
    let mut next = pin!(sleep_until(Instant::now()));
    poll_fn(|cx| {
        loop {
            if !waiting.is_empty()
                && next.as_mut().poll(cx).is_ready()
                && let Some(address) = waiting.pop_front()
            {
                running.push(Box::pin(connect(address)));
                next.as_mut().reset(Instant::now() + DELAY);
                continue;
            }
            let mut failed = false;
            let mut index = 0;
            while let Some(attempt) = running.get_mut(index) {
                match attempt.as_mut().poll(cx) {
                    Poll::Ready(Ok(connected)) => return Poll::Ready(Ok(connected)),
                    Poll::Ready(Err(error)) => {
                        failure = Some(error);
                        failed = true;
                        drop(running.swap_remove(index));
                    }
                    Poll::Pending => index += 1,
                }
            }
            if failed && !waiting.is_empty() {
                next.as_mut().reset(Instant::now());
                continue;
            }
            if running.is_empty() && waiting.is_empty() {
                let nothing = || io::ErrorKind::AddrNotAvailable.into();
                return Poll::Ready(Err(failure.take().unwrap_or_else(nothing)));
            }
            return Poll::Pending;
        }
    })
    .await
}

/// The families in turn, beginning with that of the first address (RFC 8305, 4).
fn in_turn<'a>(addresses: impl Iterator<Item = &'a Address>) -> VecDeque<&'a Address> {
    let is_v6 =
        |address: &Address| matches!(address, Address::Socket(address) if address.is_ipv6());
    let mut addresses = addresses.peekable();
    let first = addresses.peek().is_some_and(|address| is_v6(address));
    let (same, other): (Vec<_>, Vec<_>) = addresses.partition(|address| is_v6(address) == first);
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    let mut sorted = VecDeque::new();
    loop {
        match (same.next(), other.next()) {
            (None, None) => return sorted,
            pair => sorted.extend(pair.0.into_iter().chain(pair.1)),
        }
    }
}

/// Envoy's delay between two attempts.
const DELAY: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tokio::time::sleep;

    use super::*;

    fn addresses(list: &[&str]) -> Vec<Address> {
        let parse = |text: &&str| Address::Socket(text.parse().unwrap());
        list.iter().map(parse).collect()
    }

    #[test]
    fn families_take_turns() {
        let all = addresses(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "2.2.2.2:1"]);
        let sorted: Vec<_> = in_turn(all.iter()).into_iter().cloned().collect();
        let expected = ["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"];
        assert_eq!(sorted, addresses(&expected));
    }

    #[tokio::test]
    async fn the_next_begins_after_a_failure_at_once_and_else_after_a_while() {
        let all = addresses(&["1.1.1.1:1", "2.2.2.2:1", "3.3.3.3:1"]);
        let begun = Instant::now();
        let log = RefCell::new(Vec::new());
        let log = &log;
        // The first fails after 10 ms, the second takes a second, the third 5 ms.
        let winner = race(all.iter(), |address| {
            let number = all.iter().position(|other| other == address).unwrap();
            async move {
                log.borrow_mut().push((number, begun.elapsed().as_millis()));
                match number {
                    0 => {
                        sleep(Duration::from_millis(10)).await;
                        Err(io::ErrorKind::ConnectionRefused.into())
                    }
                    1 => {
                        sleep(Duration::from_secs(1)).await;
                        Ok(1)
                    }
                    _ => {
                        sleep(Duration::from_millis(5)).await;
                        Ok(2)
                    }
                }
            }
        })
        .await;
        assert_eq!(winner.unwrap(), 2);
        let log = log.borrow();
        assert_eq!((log[0].0, log[1].0, log[2].0), (0, 1, 2));
        assert!(log[2].1 - log[1].1 >= DELAY.as_millis(), "{log:?}");
    }

    #[tokio::test]
    async fn when_all_fail_the_last_failure_is_told() {
        let all = addresses(&["1.1.1.1:1", "2.2.2.2:1"]);
        let failed: io::Result<()> = race(all.iter(), |_| async {
            Err(io::ErrorKind::ConnectionRefused.into())
        })
        .await;
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
