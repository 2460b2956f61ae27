//! Ways to spell a path that a policy is about.

/// Spellings that Envoy lets by or mends where we refuse: above the root, no escapes, encoded dots before a semicolon.
pub(super) const STRICTER: &[&str] = &[
    "/..",
    "/../admin",
    "/%zz/admin",
    "/..;/admin",
    "/x/%2e%2e;/admin",
];

/// Ways to spell a path that a policy is about (`/admin` and below is denied), with the answer to each.
pub(super) const SPELLINGS: &[(&str, u16)] = &[
    ("/admin", 403),
    ("/admin/", 403),
    ("/admin?x", 403),
    ("//admin", 403),
    ("///admin//x", 403),
    ("/./admin", 403),
    ("/x/../admin", 403),
    ("/x/%2e%2e/admin", 403),
    ("/x/%2E%2e/admin", 403),
    ("/x/.%2e/admin", 403),
    ("/%61dmin", 403),
    ("/%61%64%6d%69%6e", 403),
    ("/admin;a=b", 403),
    ("/admin%20", 403),
    ("/admin%2fx", 403),
    ("/admin%5cx", 403),
    ("/admin\\x", 403),
    ("/x\\..\\admin", 403),
    ("/\\admin", 403),
    ("/admin%00", 400),
    ("/x/%00/../admin", 400),
    ("/..", 400),
    ("/../admin", 400),
    ("/%zz/admin", 400),
    ("/..;/admin", 400),
    ("/x/..;/admin", 403),
    ("/x/..;a=b/admin", 403),
    ("/x/%2e%2e;/admin", 403),
    // These are other paths, and reach the origin as such.
    ("/ADMIN", 200),
    ("/adm%2569n", 200),
    ("/%252e%252e/admin", 200),
    ("/x%2f..%2fadmin", 200),
    ("/x;/../y", 200),
    ("/x;/y..;z/admin", 200),
];
