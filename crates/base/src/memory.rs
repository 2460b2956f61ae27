//! Giving memory back that a program needed to start and hardly needs to run.

#![expect(
    unsafe_code,
    reason = "madvise and the allocator's own calls have no safe form"
)]

use std::{ffi::c_void, fs};

/// Gives back what this thread and threads that have ended have freed. The allocator does so by itself as memory is asked
/// for and freed; a program that rests after a burst (its start, a new configuration) would keep the burst. Takes a few
/// milliseconds after a large one; without mimalloc as the program's allocator it has no effect.
pub fn give_back_heap() {
    // SAFETY: it works on the calling thread's own heap and on what nobody owns, and may be called at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

/// Takes the pages of mapped files (the program itself, its libraries) out of this process, where that loses nothing:
/// nothing has ever been written to them here. They stay in the system's cache, and one that is needed again is mapped
/// again by a minor fault, sixteen pages at once. Returns how many bytes were mapped.
///
/// A start runs through far more of a program than its life does (arguments, configuration, every plan), and the kernel
/// maps around each page that is touched; of a proxy at rest that is most of its resident memory.
pub fn give_back_files() -> u64 {
    let Ok(maps) = fs::read_to_string("/proc/self/smaps") else {
        return 0;
    };
    let mut given = 0;
    for mapping in read_only_files(&maps) {
        // SAFETY: the range is one mapping of a file, without write permission and without a page of its own
        // (Anonymous: 0, so no relocated data): what is dropped is read from the same file again on the next access. It
        // is not unmapped, and a mapping that has gone since then makes madvise fail, or names pages of another one
        // that would have to be private, written and of the same address: nothing here unmaps libraries.
        let done = unsafe {
            libc::madvise(
                mapping.begin as *mut c_void,
                mapping.end - mapping.begin,
                libc::MADV_DONTNEED,
            )
        };
        if done == 0 {
            given += mapping.resident;
        }
    }
    given
}

#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    begin: usize,
    end: usize,
    resident: u64,
}

/// Mappings of files that are read or run, never written, from the text of `/proc/PID/smaps`.
fn read_only_files(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        if let Some(mapping) = head(line) {
            current = mapping;
        } else if let Some(kilobytes) = value(line, "Rss:") {
            if let Some(mapping) = &mut current {
                mapping.resident = kilobytes * 1024;
            }
        } else if let Some(kilobytes) = value(line, "Anonymous:")
            && let Some(mapping) = current.take()
            && kilobytes == 0
        {
            found.push(mapping);
        }
    }
    found
}

/// `Some` for the first line of a mapping; `Some(Some(_))` where it is private, of a file, and not writable.
fn head(line: &str) -> Option<Option<Mapping>> {
    let mut words = line.split_ascii_whitespace();
    let (begin, end) = words.next()?.split_once('-')?;
    let begin = usize::from_str_radix(begin, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let permissions = words.next()?;
    let path = words.nth(3).unwrap_or_default();
    let fits = matches!(permissions, "r-xp" | "r--p") && path.starts_with('/');
    Some(fits.then_some(Mapping {
        begin,
        end,
        resident: 0,
    }))
}

fn value(line: &str, name: &str) -> Option<u64> {
    let rest = line.strip_prefix(name)?.trim_start();
    rest.strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_written_is_given_back() {
        let smaps = "\
55aa0000-55ab0000 r--p 00000000 08:01 12 /usr/bin/outrigger
Rss:                  40 kB
Anonymous:             0 kB
55ab0000-55ac0000 r-xp 00010000 08:01 12 /usr/bin/outrigger
Rss:                  64 kB
Anonymous:             0 kB
55ac0000-55ad0000 r--p 00020000 08:01 12 /usr/bin/outrigger
Rss:                  64 kB
Anonymous:            64 kB
55ad0000-55ae0000 rw-p 00030000 08:01 12 /usr/bin/outrigger
Rss:                   4 kB
Anonymous:             0 kB
7f000000-7f010000 r--p 00000000 00:00 0 
Rss:                   4 kB
Anonymous:             0 kB
7fff0000-7fff1000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
Anonymous:             0 kB
";
        let found = read_only_files(smaps);
        let begins: Vec<usize> = found.iter().map(|m| m.begin).collect();
        assert_eq!(begins, [0x55aa_0000, 0x55ab_0000]);
        assert_eq!(found[1].resident, 64 * 1024);
    }

    #[test]
    fn a_program_runs_on_without_its_pages() {
        assert!(give_back_files() > 0);
        // Everything that follows is mapped again by use.
        assert_eq!(format!("{:?}", vec![1, 2]), "[1, 2]");
    }
}
