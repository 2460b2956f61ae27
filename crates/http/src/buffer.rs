//! Buffers on loan: each thread keeps a few, connections hold one only while bytes are in it.

use std::cell::RefCell;

use bytes::BytesMut;

/// A read of a connection that has not shown large messages.
pub(crate) const SMALL: usize = 16 * 1024;
/// A read of a connection that fills its buffers.
pub(crate) const LARGE: usize = 128 * 1024;

/// An empty read buffer of at least `size` bytes.
pub(crate) fn take_read(size: usize) -> BytesMut {
    let kept = match size {
        SMALL => READ.try_with(|free| free.try_borrow_mut().ok().and_then(|mut f| f.pop())),
        _ => Ok(None),
    };
    kept.ok()
        .flatten()
        .unwrap_or_else(|| BytesMut::with_capacity(size))
}

/// Lends a buffer of [`SMALL`] bytes to a read, and hands out the one that has got bytes; else an empty one.
pub(crate) fn lend<R>(read: impl FnOnce(&mut BytesMut) -> R) -> (R, BytesMut) {
    let mut read = Some(read);
    let lent = READ.try_with(|free| {
        let mut free = free.try_borrow_mut().ok()?;
        if free.is_empty() {
            free.push(BytesMut::with_capacity(SMALL));
        }
        let buffer = free.last_mut()?;
        let outcome = read.take()?(buffer);
        let taken = if buffer.is_empty() { None } else { free.pop() };
        Some((outcome, taken.unwrap_or_default()))
    });
    if let Ok(Some(lent)) = lent {
        return lent;
    }
    let mut buffer = BytesMut::with_capacity(SMALL);
    match read {
        Some(read) => (read(&mut buffer), buffer),
        // The closure that took it has returned what came of it.
        None => unreachable!("a buffer was lent"),
    }
}

/// Gives a read buffer back; one whose bytes are still referred to is let go.
pub(crate) fn give_read(mut buffer: BytesMut) {
    buffer.clear();
    if buffer.capacity() > 2 * SMALL || !buffer.try_reclaim(SMALL) {
        return;
    }
    let _ = READ.try_with(|free| {
        if let Ok(mut free) = free.try_borrow_mut()
            && free.len() < KEPT
        {
            free.push(buffer);
        }
    });
}

/// An empty write buffer.
pub(crate) fn take_write() -> Vec<u8> {
    WRITE
        .try_with(|free| free.try_borrow_mut().ok().and_then(|mut f| f.pop()))
        .ok()
        .flatten()
        .unwrap_or_else(|| Vec::with_capacity(2048))
}

/// Gives a write buffer back.
pub(crate) fn give_write(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > 2 * LARGE {
        return;
    }
    buffer.clear();
    let _ = WRITE.try_with(|free| {
        if let Ok(mut free) = free.try_borrow_mut()
            && free.len() < KEPT
        {
            free.push(buffer);
        }
    });
}

const KEPT: usize = 16;

thread_local! {
    static READ: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static WRITE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}
