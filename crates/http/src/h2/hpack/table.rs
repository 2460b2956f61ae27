//! The table that a connection builds up: fields in the order they came, the oldest go first.

use std::collections::VecDeque;

use super::{Class, OVERHEAD};

/// A table, of the side that reads or of the side that writes.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Text of all entries, the oldest first; what was dropped may still lie before them.
    text: Vec<u8>,
    /// What was taken off the front of `text` so far: places of entries count from the beginning.
    base: u64,
    entries: VecDeque<Entry>,
    size: usize,
    limit: usize,
    /// Entries that were ever put in.
    inserted: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    at: u64,
    name: u32,
    value: u32,
    class: Class,
    hash: u32,
}

/// A field of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) class: Class,
    pub(super) hash: u32,
}

impl Table {
    pub(super) fn new(limit: usize) -> Table {
        Table {
            limit,
            ..Table::default()
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// The entry of an index that counts from 0, the newest.
    pub(super) fn get(&self, index: usize) -> Option<Row<'_>> {
        let at = self.entries.len().checked_sub(index.checked_add(1)?)?;
        self.entries.get(at).map(|entry| self.row(entry))
    }

    /// The entry that was put in as number `number`, and its index now.
    pub(super) fn numbered(&self, number: u32) -> Option<(Row<'_>, usize)> {
        let index = self.inserted.wrapping_sub(number).wrapping_sub(1) as usize;
        self.get(index).map(|row| (row, index))
    }

    /// Changes how much is kept.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.make_room(0);
    }

    /// Puts a field in and gives its number. One that is larger than the table empties it.
    pub(super) fn insert(
        &mut self,
        name: &[u8],
        value: &[u8],
        class: Class,
        hash: u32,
    ) -> Option<u32> {
        let size = name.len() + value.len() + OVERHEAD;
        self.make_room(size);
        if size > self.limit {
            return None;
        }
        let length = name.len() + value.len();
        if self.text.len() + length > self.text.capacity() {
            self.compact();
        }
        let at = self.base + self.text.len() as u64;
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        self.entries.push_back(Entry {
            at,
            name: name.len() as u32,
            value: value.len() as u32,
            class,
            hash,
        });
        self.size += size;
        self.inserted = self.inserted.wrapping_add(1);
        Some(self.inserted.wrapping_sub(1))
    }

    /// Drops the oldest until there is room for so much.
    fn make_room(&mut self, size: usize) {
        while self.size + size > self.limit
            && let Some(entry) = self.entries.pop_front()
        {
            self.size -= (entry.name + entry.value) as usize + OVERHEAD;
        }
    }

    /// Moves the text of what is left to the front.
    fn compact(&mut self) {
        let live = self
            .entries
            .front()
            .map_or(self.text.len(), |entry| (entry.at - self.base) as usize);
        if live > 0 {
            self.text.drain(..live);
            self.base += live as u64;
        }
    }

    fn row(&self, entry: &Entry) -> Row<'_> {
        let at = (entry.at - self.base) as usize;
        let middle = at + entry.name as usize;
        Row {
            name: &self.text[at..middle],
            value: &self.text[middle..middle + entry.value as usize],
            class: entry.class,
            hash: entry.hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_first_and_the_oldest_go() {
        let mut table = Table::new(3 * (OVERHEAD + 4));
        let mut numbers = Vec::new();
        for n in 0..1000u32 {
            let value = format!("{:02}", n % 100);
            numbers.push(
                table
                    .insert(b"ab", value.as_bytes(), Class::Field, n)
                    .unwrap(),
            );
            for back in 0..4u32 {
                let row = table.get(back as usize);
                if back < 3 && back <= n {
                    assert_eq!(row.unwrap().hash, n - back);
                    let number = numbers[(n - back) as usize];
                    let (row, index) = table.numbered(number).unwrap();
                    assert_eq!((row.hash, index), (n - back, back as usize));
                    assert_eq!(row.value, format!("{:02}", (n - back) % 100).as_bytes());
                } else {
                    assert!(row.is_none());
                }
            }
        }
        assert!(table.text.capacity() < 64, "{}", table.text.capacity());
        assert!(table.numbered(numbers[0]).is_none());
        table.set_limit(OVERHEAD + 4);
        assert!(table.get(0).is_some() && table.get(1).is_none());
        assert!(table.insert(&[b'x'; 40], b"", Class::Field, 0).is_none());
        assert!(table.get(0).is_none());
    }
}
