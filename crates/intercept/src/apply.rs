//! Writing the rules, and taking everything back when that fails.
//!
//! What is there is read first and compared, in order, with what should be. Rules in place are left alone, so that an
//! init container that kubelet runs again ends well. Other ISTIO rules are replaced only when asked to: the old ones go
//! and the new ones come in the same transaction of a table, so there is no moment in which traffic passes by the
//! proxy. A failure in any table or family restores every table that was touched.

use std::{fs::OpenOptions, io::Write};

use crate::{
    Error,
    backend::{self, Backend},
    config::Config,
    conntrack,
    model::{Family, Rule, Table},
    restore, routes,
    state::{self, Tables},
    sysctls,
};

/// Where the steps are told.
pub type Log<'a> = &'a mut dyn FnMut(String);

/// One family with what it holds and what it should hold.
struct Side {
    backend: Backend,
    family: Family,
    before: String,
    there: Tables,
    should: Tables,
}

/// Applies `rules` (from [`crate::program::rules`]) in this network namespace, or removes ours if that is asked for;
/// then sets the addresses, routes and routing rules that go with them.
pub fn apply(config: &Config, rules: &[Rule], log: Log<'_>) -> Result<(), Error> {
    let sides = sides(config, rules, log)?;
    let marks: Vec<u32> = sides.iter().flat_map(|s| s.there.tproxy_marks()).collect();
    let untracked = sides.iter().any(|s| s.there.untracks());
    if config.cleanup_only {
        release(config, log, || {
            let mut changed = false;
            for side in &sides {
                changed |= side.release()?;
            }
            Ok(changed)
        });
        // What is there is read anew: the ways in may be gone by now.
        write(&self::sides(config, rules, log)?, &[], log)?;
        forget(config, log);
        if untracked {
            sysctls::forget_marks();
        }
        return routes::remove(config, &marks);
    }
    if config.tproxy_notrack {
        sysctls::keep_marks()?;
    }
    let mut replaced = Vec::new();
    let mut differences = Vec::new();
    for side in sides {
        // IPv6 rules of an earlier run are only ours to remove when asked to reconcile.
        let wanted = !side.should.0.is_empty() || config.reconcile;
        let differs = side.there.differences(&side.should);
        if wanted && (config.force_apply || !differs.is_empty()) {
            if side.there.has_ours() {
                differences.extend(differs);
            }
            replaced.push(side);
        }
    }
    if replaced.is_empty() {
        log("The rules are already in place; nothing to do.".into());
    } else if differences.is_empty() || config.reconcile || config.force_apply {
        for difference in &differences {
            log(format!("replacing: {difference}"));
        }
        let written = write(&replaced, rules, log);
        if written.is_err() && config.tproxy_notrack && !untracked {
            sysctls::forget_marks();
        }
        written?;
    } else {
        return Err(Error::Conflict(format!(
            "other ISTIO rules are in place; nothing was changed. --reconcile replaces them, --cleanup-only removes \
             them:\n  {}",
            differences.join("\n  ")
        )));
    }
    if untracked && !config.tproxy_notrack {
        sysctls::forget_marks();
    }
    match config.reconcile {
        true => routes::replace(config, &marks),
        false => routes::add(config),
    }
}

/// Before rules go: `detach` makes that nothing new is captured, and what is under way may end, while the chains that
/// are left still make the kernel translate for it. A look at connection tracking before that proves nothing: a
/// connection that begins after the look would lose its translation with the rules. `detach` tells whether there was
/// anything to take away; a clean-up goes on where this cannot be done.
pub(crate) fn release(config: &Config, log: Log<'_>, detach: impl FnOnce() -> Result<bool, Error>) {
    let waited = detach().and_then(|changed| {
        // A clean-up that was killed may have taken the ways in already.
        match changed || conntrack::translated(config)?.iter().any(|e| e.alive) {
            true => conntrack::drain(config),
            false => Ok(0),
        }
    });
    match waited {
        Ok(0) => {}
        Ok(left) => log(format!(
            "warning: {left} captured connections are still open and are cut"
        )),
        Err(e) => log(format!(
            "warning: captured connections cannot be waited for: {e}"
        )),
    }
}

/// After rules are gone: entries of connection tracking must not lead later connections to the proxy.
pub(crate) fn forget(config: &Config, log: Log<'_>) {
    if let Err(e) = conntrack::forget(config) {
        log(format!(
            "warning: entries of connection tracking are left: {e}"
        ));
    }
}

impl Side {
    /// Takes away the ways from the built-in chains into ours; whether there were any.
    fn release(&self) -> Result<bool, Error> {
        let mut text = String::new();
        for table in Table::ALL {
            let mut jumps = self.there.removals(table, &self.should);
            // A packet that has passed PREROUTING already is to meet INPUT as it is.
            jumps.retain(|line| line.starts_with("-D ") && !line.starts_with("-D INPUT "));
            if let Some(part) = restore::table_text(&[], self.family, table, &jumps) {
                text.push_str(&part);
            }
        }
        match text.is_empty() {
            true => Ok(false),
            false => self.backend.restore(&text, false).map(|()| true),
        }
    }
}

/// How this network namespace differs from `rules`, a sentence each.
pub fn verify(config: &Config, rules: &[Rule]) -> Result<Vec<String>, Error> {
    let mut out = Vec::new();
    for side in sides(config, rules, &mut |_| {})? {
        if !side.should.0.is_empty() {
            out.extend(side.there.differences(&side.should));
        }
    }
    Ok(out)
}

/// ISTIO rules that are here, in either back end, where `rules` has none of their family, a sentence each. They are
/// read alone: what cannot be read is taken for clean.
pub(crate) fn foreign(config: &Config, rules: &[Rule]) -> Vec<String> {
    let mut out = Vec::new();
    for family in [Family::V4, Family::V6] {
        let looked_at = family == Family::V4 || config.enable_inbound_ipv6;
        if !looked_at || rules.iter().any(|r| r.family == family) {
            continue;
        }
        for text in backend::held(family) {
            let there = Tables::parse(&text);
            if there.has_ours() {
                out.extend(there.differences(&Tables::default()));
            }
        }
    }
    out
}

/// Prints what would be done; `file` also gets every command and text (`DRY_RUN_FILE_PATH`).
pub fn dry_run(
    config: &Config,
    rules: &[Rule],
    file: Option<String>,
    log: Log<'_>,
) -> Result<(), Error> {
    let mut steps = vec!["iptables-save".to_string(), "ip6tables-save".into()];
    for (family, program) in [
        (Family::V4, "iptables-restore"),
        (Family::V6, "ip6tables-restore"),
    ] {
        let text = restore::text(rules, family);
        if !config.cleanup_only && !text.is_empty() {
            log(format!(
                "Running iptables restore with: {program} and the following input:\n{text}"
            ));
            steps.push(text.trim_end().into());
        }
    }
    steps.push("iptables-save".into());
    if config.enable_inbound_ipv6 {
        steps.push("ip6tables-save".into());
    }
    let Some(path) = file else { return Ok(()) };
    let fail = |why| Error::File {
        path: path.clone(),
        why,
    };
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(fail)?;
    file.write_all(format!("{}\n", steps.join("\n")).as_bytes())
        .map_err(fail)
}

fn sides(config: &Config, rules: &[Rule], log: Log<'_>) -> Result<Vec<Side>, Error> {
    let mut sides = Vec::new();
    for family in [Family::V4, Family::V6] {
        let needed = family == Family::V4 || config.enable_inbound_ipv6;
        // Without IPv6 there is nothing to write; what an earlier run left is looked for only when asked to.
        if !needed && !config.reconcile && !config.cleanup_only {
            continue;
        }
        let backend = match Backend::find(config, family) {
            Ok(backend) => backend,
            Err(e) if needed => return Err(e),
            // A node without IPv6 must not keep an IPv4 pod from starting.
            Err(e) => {
                log(format!(
                    "IPv6 is not captured and ip6tables does not work: {e}"
                ));
                continue;
            }
        };
        // What cannot be read cannot be kept; it is taken for clean, as istio-iptables does.
        let before = backend.save().unwrap_or_default();
        sides.push(Side {
            there: Tables::parse(&before),
            should: Tables::expected(rules, family),
            backend,
            family,
            before,
        });
    }
    Ok(sides)
}

/// Replaces what is ours on every side by `rules`.
fn write(sides: &[Side], rules: &[Rule], log: Log<'_>) -> Result<(), Error> {
    let mut touched: Vec<(&Side, Vec<Table>)> = Vec::new();
    for side in sides {
        let mut tables = Vec::new();
        let mut text = String::new();
        for table in Table::ALL {
            let removals = side.there.removals(table, &side.should);
            if let Some(part) = restore::table_text(rules, side.family, table, &removals) {
                tables.push(table);
                text.push_str(&part);
            }
        }
        if text.is_empty() {
            continue;
        }
        let program = side.backend.program("-restore");
        log(format!(
            "Running iptables restore with: {program} and the following input:\n{text}"
        ));
        touched.push((side, tables));
        if let Err(e) = side.backend.restore(&text, false) {
            for (side, tables) in touched {
                let text: String = tables
                    .iter()
                    .map(|t| state::section(&side.before, *t))
                    .collect();
                if let Err(e) = side.backend.restore(&text, true) {
                    log(format!("taking back what was written failed as well: {e}"));
                }
            }
            return Err(e);
        }
    }
    for (side, _) in touched {
        let family = match side.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        let after = side.backend.save()?;
        log(format!("Final iptables state ({family}):\n{after}"));
        let should = Tables::expected(rules, side.family);
        for difference in Tables::parse(&after).differences(&should) {
            log(format!("warning: read back from the kernel, {difference}"));
        }
    }
    Ok(())
}
