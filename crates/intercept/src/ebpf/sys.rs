//! The few calls of bpf(2) that aya has no word for.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // struct { __aligned_u64 pathname; __u32 bpf_fd; __u32 file_flags; }
    owned(BPF_OBJ_GET, pair(path.as_ptr() as u64), 0)
}

/// Pins a link or a map at `path`.
pub(super) fn pin(object: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = pair(path.as_ptr() as u64);
    bpf(BPF_OBJ_PIN, &mut [low, high, number(object), 0, 0, 0, 0, 0]).map(drop)
}

/// Attaches a program to a folder of cgroup2 or a network namespace, until the link is closed and unpinned.
pub(super) fn link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<OwnedFd> {
    // struct { __u32 prog_fd; __u32 target_fd; __u32 attach_type; __u32 flags; }
    owned(BPF_LINK_CREATE, [number(&program), number(&target)], hook)
}

/// Opens the program with that number.
pub(super) fn program(id: u32) -> io::Result<OwnedFd> {
    owned(BPF_PROG_GET_FD_BY_ID, [id, 0], 0)
}

/// Attaches a program to a map of sockets, which keeps it.
pub(super) fn attach(program: BorrowedFd<'_>, target: BorrowedFd<'_>, hook: u32) -> io::Result<()> {
    // struct { __u32 target_fd; __u32 attach_bpf_fd; __u32 attach_type; ... }
    let mut attributes = [number(&target), number(&program), hook, 0, 0, 0, 0, 0];
    bpf(BPF_PROG_ATTACH, &mut attributes).map(drop)
}

/// The number of the program that a map of sockets has.
pub(super) fn attached(target: BorrowedFd<'_>, hook: u32) -> io::Result<Option<u32>> {
    let mut id = 0u32;
    let [low, high] = pair(&raw mut id as u64);
    // struct { __u32 target_fd, attach_type, query_flags, attach_flags; __aligned_u64 prog_ids; __u32 prog_cnt; }
    let mut attributes = [number(&target), hook, 0, 0, low, high, 1, 0];
    bpf(BPF_PROG_QUERY, &mut attributes)?;
    Ok((attributes[6] != 0).then_some(id))
}

/// Takes a link's program away from where it is attached, at once and whoever else has the link open.
pub(super) fn detach(link: &OwnedFd) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut [number(link), 0, 0, 0, 0, 0, 0, 0]).map(drop)
}

/// A field of what /proc tells of a descriptor: of a link `cgroup_id` or `netns_ino`, which are 0 once that is gone.
pub(super) fn field(fd: &OwnedFd, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found == name).then(|| value.trim().parse().ok())?
    })
}

fn number(fd: &impl AsRawFd) -> u32 {
    // A descriptor that is open is not negative.
    fd.as_raw_fd() as u32
}

/// A 64-bit value as the kernel finds it in memory.
fn pair(value: u64) -> [u32; 2] {
    let bytes = value.to_ne_bytes();
    let half =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}

fn owned(command: libc::c_long, [a, b]: [u32; 2], c: u32) -> io::Result<OwnedFd> {
    let fd = bpf(command, &mut [a, b, c, 0, 0, 0, 0, 0])?;
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The commands that are used here have attributes of at most 32 bytes; what is not used must be zero.
#[repr(C, align(8))]
struct Attributes([u32; 8]);

fn bpf(command: libc::c_long, attributes: &mut [u32; 8]) -> io::Result<i32> {
    let mut given = Attributes(*attributes);
    // SAFETY: the attributes outlive the call and their size is given; a path or a place for numbers that they point to
    // is kept by the caller.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw mut given,
            size_of::<Attributes>(),
        )
    };
    *attributes = given.0;
    match rc {
        -1 => Err(io::Error::last_os_error()),
        rc => Ok(rc as i32),
    }
}

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
