//! A header block: the peer's bytes, and edits.
//!
//! All text lies in one arena; a field is a few numbers. Parsing copies a head once into an arena
//! that a thread-local free-list lends, so that a warm worker allocates nothing and an idle
//! connection holds nothing. Names keep their case and fields their order; look-ups ignore case.
//!
//! Two things make it fast. Each field carries a [`Key`], four bytes made of its name, which a
//! look-up compares before it compares names. And a field mostly lies in the arena as HTTP/1 writes
//! it, `name: value` and CRLF, so that fields which lie one behind the other are written at once.

use std::{cell::RefCell, fmt};

/// A place in the arena.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Span {
    at: u32,
    len: u32,
}

impl Span {
    /// A piece of a head, which `Limits` keep far below 4 GiB.
    pub(crate) fn new(at: usize, end: usize) -> Span {
        Span {
            at: at as u32,
            len: (end - at) as u32,
        }
    }

    fn end(self) -> u32 {
        self.at + self.len
    }
}

/// Length, first, middle and last letter of a name, whatever their case: names with different keys differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(pub(crate) u32);

impl Key {
    /// The key of a name.
    #[inline]
    pub(crate) const fn of(name: &[u8]) -> Key {
        let length = name.len();
        if length == 0 {
            return Key(0);
        }
        Key(length as u32 & 0xff
            | small(name[0]) << 8
            | small(name[length / 2]) << 16
            | small(name[length - 1]) << 24)
    }

    fn first(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// One bit of 64, by all of the key.
    const fn bit(self) -> u64 {
        1 << (self.0.wrapping_mul(0x9e37_79b1) >> 26)
    }
}

/// Makes letters small; what it does to other bytes does not matter, as it does it to all.
const fn small(byte: u8) -> u32 {
    (byte | 0x20) as u32
}

/// The name of a field that is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Name<'a> {
    key: Key,
    pub(crate) text: &'a [u8],
}

impl Name<'_> {
    /// Whether it is this one, ignoring case.
    #[inline(always)]
    pub(crate) fn is(self, name: &'static str) -> bool {
        self.key == Key::of(name.as_bytes()) && self.text.eq_ignore_ascii_case(name.as_bytes())
    }
}

#[derive(Debug, Clone, Copy)]
struct Field {
    key: Key,
    name: Span,
    value: Span,
    /// HTTP/2 may never put it into a table (RFC 7541, 7.1.3): its sender has said so.
    secret: bool,
    /// It lies in the arena as a line of HTTP/1.
    line: bool,
}

/// Header fields in their order. Names keep the case they came with.
pub struct Headers {
    text: Vec<u8>,
    fields: Vec<Field>,
    /// The bits of all keys that were ever there: most of what is asked for is not, and is not looked for then.
    seen: u64,
}

impl Headers {
    /// An empty block, in storage of the thread's free-list.
    pub fn new() -> Headers {
        FREE.with(|free| match free.try_borrow_mut() {
            Ok(mut free) => free.pop().unwrap_or_else(Storage::new),
            Err(_) => Storage::new(),
        })
        .into()
    }

    /// The first value of `name`.
    #[inline]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.find(name).map(|field| self.bytes(field.value))
    }

    /// The first value of `name`, if it is UTF-8.
    #[inline]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Every value of `name`, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        let key = Key::of(name.as_bytes());
        self.perhaps(key)
            .iter()
            .filter(move |field| self.is(field, key, name.as_bytes()))
            .map(|field| self.bytes(field.value))
    }

    /// All values of `name` joined by commas, as matchers see them; borrowed when there is one.
    pub fn joined(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        let key = Key::of(name.as_bytes());
        let mut values = self
            .perhaps(key)
            .iter()
            .filter(|field| self.is(field, key, name.as_bytes()));
        let first = self.bytes(values.next()?.value);
        let mut joined = None::<Vec<u8>>;
        for field in values {
            let joined = joined.get_or_insert_with(|| first.to_vec());
            joined.push(b',');
            joined.extend_from_slice(self.bytes(field.value));
        }
        Some(joined.map_or(std::borrow::Cow::Borrowed(first), std::borrow::Cow::Owned))
    }

    /// Whether a field of that name is there.
    #[inline]
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Whether there is a field whose name begins like this, ignoring case.
    pub fn contains_prefix(&self, prefix: &str) -> bool {
        let Some(&first) = prefix.as_bytes().first() else {
            return !self.is_empty();
        };
        self.fields.iter().any(|field| {
            if field.key.first() != small(first) {
                return false;
            }
            let start = self.bytes(field.name).get(..prefix.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
        })
    }

    /// Whether one of the comma-separated elements of `name` is `token`, ignoring case.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.get_all(name).any(|value| {
            value
                .split(|&byte| byte == b',')
                .any(|element| element.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
        })
    }

    /// Adds a field at the end. CR, LF and NUL in the value become spaces, so that no value, from
    /// wherever it came, can split a message.
    pub fn append(&mut self, name: &str, value: impl AsRef<[u8]>) {
        let field = self.add_line(name.as_bytes(), value.as_ref(), true);
        self.push(field);
    }

    /// Adds a field before all others.
    pub fn prepend(&mut self, name: &str, value: impl AsRef<[u8]>) {
        let field = self.add_line(name.as_bytes(), value.as_ref(), true);
        self.seen |= field.key.bit();
        self.fields.insert(0, field);
    }

    /// Gives `name` this one value: the first such field keeps its place and the spelling of its
    /// name, the others go; without one it is added at the end.
    pub fn set(&mut self, name: &str, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        let key = Key::of(name.as_bytes());
        let Some(first) = self.position(key, name) else {
            return self.append(name, value);
        };
        let span = self.add_value(value);
        let field = &mut self.fields[first];
        (field.value, field.line) = (span, false);
        self.remove_after(key, name, first + 1);
    }

    /// Adds a field unless one of that name is there.
    pub fn set_if_absent(&mut self, name: &str, value: impl AsRef<[u8]>) {
        if !self.contains(name) {
            self.append(name, value);
        }
    }

    /// Removes every field of that name; tells whether there was one.
    #[inline]
    pub fn remove(&mut self, name: &str) -> bool {
        let key = Key::of(name.as_bytes());
        match self.position(key, name) {
            Some(first) => {
                self.remove_after(key, name, first);
                true
            }
            None => false,
        }
    }

    /// Keeps the fields for which `keep(name, value)` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &[u8]) -> bool) {
        let text = &self.text;
        self.fields
            .retain(|field| keep(str_of(slice(text, field.name)), slice(text, field.value)));
    }

    /// The fields as (name, value).
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &[u8])> {
        self.fields
            .iter()
            .map(|field| (str_of(self.bytes(field.name)), self.bytes(field.value)))
    }

    /// The fields, and whether HTTP/2 must keep each out of its tables.
    pub(crate) fn iter_with_secrecy(&self) -> impl Iterator<Item = (Name<'_>, &[u8], bool)> {
        self.fields.iter().map(|field| {
            let name = Name {
                key: field.key,
                text: self.bytes(field.name),
            };
            (name, self.bytes(field.value), field.secret)
        })
    }

    /// How many fields.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// The length of all names and values, with four bytes a field, as HTTP/1 writes them.
    pub fn wire_size(&self) -> usize {
        self.fields
            .iter()
            .map(|field| (field.name.len + field.value.len) as usize + 4)
            .sum()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.text.clear();
        self.fields.clear();
        self.seen = 0;
    }

    /// Writes `name: value` lines for the fields that `skip` does not name, asked with name and value.
    pub(crate) fn write_lines(
        &self,
        out: &mut Vec<u8>,
        mut skip: impl FnMut(Name<'_>, &[u8]) -> bool,
    ) {
        // Mostly more than enough: what was replaced still lies in the arena.
        out.reserve(self.text.len() + 64);
        // Lines that lie one behind the other and are not yet written.
        let mut run = 0..0;
        for field in &self.fields {
            let name = Name {
                key: field.key,
                text: self.bytes(field.name),
            };
            if skip(name, self.bytes(field.value)) {
                continue;
            }
            if field.line {
                let (at, end) = (field.name.at as usize, field.value.end() as usize + 2);
                if at != run.end {
                    out.extend_from_slice(&self.text[run]);
                    run = at..end;
                }
                run.end = end;
                continue;
            }
            out.extend_from_slice(&self.text[run]);
            run = 0..0;
            out.extend_from_slice(name.text);
            out.extend_from_slice(b": ");
            out.extend_from_slice(self.bytes(field.value));
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(&self.text[run]);
    }

    /// Copies text into the arena, unchanged.
    pub(crate) fn add(&mut self, text: &[u8]) -> Span {
        // A head is limited to far less than 4 GiB by `Limits`; edits come from configuration.
        let at = self.text.len();
        self.text.extend_from_slice(text);
        Span::new(at, at + text.len())
    }

    /// Copies a field into the arena, as a line.
    fn add_line(&mut self, name: &[u8], value: &[u8], clean: bool) -> Field {
        self.text.reserve(name.len() + value.len() + 4);
        let at = self.add(name);
        self.text.extend_from_slice(b": ");
        let value = match clean {
            true => self.add_value(value),
            false => self.add(value),
        };
        self.text.extend_from_slice(b"\r\n");
        Field {
            key: Key::of(name),
            name: at,
            value,
            secret: false,
            line: true,
        }
    }

    /// Adds a field whose text is known to be valid.
    pub(crate) fn push_parsed(&mut self, name: &[u8], value: &[u8]) {
        let field = self.add_line(name, value, false);
        self.push(field);
    }

    /// Adds a field that lies in the arena, or will once its head is copied there.
    #[inline]
    pub(crate) fn push_placed(&mut self, key: Key, name: Span, value: Span, line: bool) {
        self.push(Field {
            key,
            name,
            value,
            secret: false,
            line,
        });
    }

    #[inline]
    fn push(&mut self, field: Field) {
        self.seen |= field.key.bit();
        self.fields.push(field);
    }

    /// The fields that may have this key: all, or none.
    #[inline]
    fn perhaps(&self, key: Key) -> &[Field] {
        match self.seen & key.bit() {
            0 => &[],
            _ => &self.fields,
        }
    }

    /// Copies the head that the fields of [`Headers::push_placed`] were found in.
    pub(crate) fn place(&mut self, head: &[u8]) {
        debug_assert!(self.text.is_empty(), "places count from its beginning");
        self.text.extend_from_slice(head);
    }

    /// The last field is one that no table of HTTP/2 may hold.
    pub(crate) fn mark_last_secret(&mut self) {
        if let Some(field) = self.fields.last_mut() {
            field.secret = true;
        }
    }

    pub(crate) fn bytes(&self, span: Span) -> &[u8] {
        slice(&self.text, span)
    }

    pub(crate) fn str(&self, span: Span) -> &str {
        str_of(self.bytes(span))
    }

    fn add_value(&mut self, value: &[u8]) -> Span {
        let span = self.add(value);
        // All of them at once and without an early end: many bytes are looked at together.
        let least = value.iter().fold(u8::MAX, |least, &byte| least.min(byte));
        if least <= b'\r' {
            for byte in &mut self.text[span.at as usize..] {
                if matches!(byte, b'\r' | b'\n' | 0) {
                    *byte = b' ';
                }
            }
        }
        span
    }

    #[inline]
    fn is(&self, field: &Field, key: Key, name: &[u8]) -> bool {
        field.key == key && self.bytes(field.name).eq_ignore_ascii_case(name)
    }

    #[inline]
    fn find(&self, name: &str) -> Option<&Field> {
        let key = Key::of(name.as_bytes());
        match self.seen & key.bit() {
            0 => None,
            _ => self.find_keyed(key, name),
        }
    }

    fn find_keyed(&self, key: Key, name: &str) -> Option<&Field> {
        self.fields
            .iter()
            .find(|field| self.is(field, key, name.as_bytes()))
    }

    #[inline]
    fn position(&self, key: Key, name: &str) -> Option<usize> {
        match self.seen & key.bit() {
            0 => None,
            _ => self.position_keyed(key, name),
        }
    }

    fn position_keyed(&self, key: Key, name: &str) -> Option<usize> {
        self.fields
            .iter()
            .position(|field| self.is(field, key, name.as_bytes()))
    }

    fn remove_after(&mut self, key: Key, name: &str, from: usize) {
        let mut at = from;
        while at < self.fields.len() {
            if self.is(&self.fields[at], key, name.as_bytes()) {
                self.fields.remove(at);
            } else {
                at += 1;
            }
        }
    }
}

impl Default for Headers {
    fn default() -> Self {
        Headers::new()
    }
}

impl Clone for Headers {
    fn clone(&self) -> Self {
        let mut copy = Headers::new();
        copy.text.extend_from_slice(&self.text);
        copy.fields.extend_from_slice(&self.fields);
        copy.seen = self.seen;
        copy
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, String::from_utf8_lossy(value))),
            )
            .finish()
    }
}

impl<N: AsRef<str>, V: AsRef<[u8]>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(fields: I) -> Self {
        let mut headers = Headers::new();
        for (name, value) in fields {
            headers.append(name.as_ref(), value);
        }
        headers
    }
}

impl Drop for Headers {
    fn drop(&mut self) {
        let mut storage = Storage {
            text: std::mem::take(&mut self.text),
            fields: std::mem::take(&mut self.fields),
        };
        if storage.text.capacity() == 0 || storage.text.capacity() > KEPT_TEXT {
            return;
        }
        storage.text.clear();
        storage.fields.clear();
        // While the thread ends its free-list may be gone; then the storage goes too.
        let _ = FREE.try_with(|free| {
            if let Ok(mut free) = free.try_borrow_mut()
                && free.len() < KEPT_BLOCKS
            {
                free.push(storage);
            }
        });
    }
}

struct Storage {
    text: Vec<u8>,
    fields: Vec<Field>,
}

impl Storage {
    /// Room for a usual head: growing to it would take an allocation for each doubling.
    fn new() -> Storage {
        Storage {
            text: Vec::with_capacity(USUAL_TEXT),
            fields: Vec::with_capacity(USUAL_FIELDS),
        }
    }
}

impl From<Storage> for Headers {
    fn from(storage: Storage) -> Headers {
        Headers {
            text: storage.text,
            fields: storage.fields,
            seen: 0,
        }
    }
}

fn slice(text: &[u8], span: Span) -> &[u8] {
    &text[span.at as usize..span.at as usize + span.len as usize]
}

/// Names and start lines are checked to be ASCII before they get here.
fn str_of(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or("")
}

const USUAL_TEXT: usize = 512;
const USUAL_FIELDS: usize = 16;

/// A larger arena costs less to allocate than to fill.
const KEPT_TEXT: usize = 4 * 1024;
/// Two for each request that is under way on a busy worker.
const KEPT_BLOCKS: usize = 256;

thread_local! {
    static FREE: RefCell<Vec<Storage>> = const { RefCell::new(Vec::new()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Headers {
        [
            ("Host", "a"),
            ("X-One", "1"),
            ("x-two", "2"),
            ("x-one", "3"),
        ]
        .into_iter()
        .collect()
    }

    fn lines(headers: &Headers) -> String {
        let mut out = Vec::new();
        headers.write_lines(&mut out, |_, _| false);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn order_and_case_are_kept_and_look_ups_ignore_case() {
        let headers = block();
        assert_eq!(headers.get("HOST"), Some(&b"a"[..]));
        assert_eq!(headers.joined("x-one").unwrap().as_ref(), b"1,3");
        assert_eq!(
            lines(&headers),
            "Host: a\r\nX-One: 1\r\nx-two: 2\r\nx-one: 3\r\n"
        );
    }

    #[test]
    fn set_keeps_the_place_and_drops_the_doubles() {
        let mut headers = block();
        headers.set("x-one", "9");
        headers.set("x-new", "n");
        headers.remove("X-TWO");
        assert_eq!(lines(&headers), "Host: a\r\nX-One: 9\r\nx-new: n\r\n");
    }

    #[test]
    fn no_value_can_split_a_message() {
        let mut headers = Headers::new();
        headers.append("x", "a\r\nb: c\0");
        assert_eq!(lines(&headers), "x: a  b: c \r\n");
    }
}
