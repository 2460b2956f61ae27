//! What changes the process: draining, health, logging, counters, the end.

use super::{Admin, Answer, Params};
use crate::{
    logging::{self, LogLevel},
    server::State,
};

/// `/drain_listeners?graceful&skip_exit&inboundonly`.
pub(super) fn drain_listeners(admin: &Admin, params: &Params) -> Answer {
    let graceful = params.has("graceful");
    let skip_exit = params.has("skip_exit");
    if skip_exit && !graceful {
        return Answer::text("skip_exit requires graceful\n").status(400);
    }
    admin
        .server
        .drain_listeners(params.has("inboundonly"), graceful, skip_exit);
    Answer::text("OK\n")
}

/// `/healthcheck/fail` and `/healthcheck/ok`.
pub(super) fn health_check(admin: &Admin, fail: bool) -> Answer {
    admin.server.fail_health_check(fail);
    Answer::text("OK\n")
}

/// `/quitquitquit`.
pub(super) fn quit(admin: &Admin) -> Answer {
    admin.server.set_state(State::Draining);
    admin.server.quit();
    Answer::text("OK\n")
}

/// `/reset_counters`.
pub(super) fn reset_counters(admin: &Admin) -> Answer {
    admin.server.store.reset_counters();
    Answer::text("OK\n")
}

/// `/logging`, `/logging?level=debug`, `/logging?paths=upstream:debug,router:trace`, `/logging?upstream=debug`.
pub(super) fn logging(params: &Params) -> Answer {
    for (key, value) in params.iter() {
        if let Err(message) = set_levels(key, value) {
            return Answer::text(format!("error: {message}\n")).status(400);
        }
    }
    let lines: String = logging::levels()
        .iter()
        .map(|(name, level)| format!("  {name}: {}\n", level.as_str()))
        .collect();
    Answer::text(format!("active loggers:\n{lines}\n"))
}

fn set_levels(key: &str, value: &str) -> Result<(), String> {
    let level =
        |word: &str| LogLevel::parse(word).ok_or_else(|| format!("unknown logger level `{word}`"));
    match key {
        "level" => logging::set_all(level(value)?),
        "paths" => {
            for pair in value.split(',').filter(|p| !p.is_empty()) {
                let (name, word) = pair
                    .split_once(':')
                    .ok_or_else(|| format!("`{pair}` is not NAME:LEVEL"))?;
                set_levels(name, word)?;
            }
        }
        name => {
            let level = level(value)?;
            if !logging::set(name, level) {
                return Err(format!("unknown logger name `{name}`"));
            }
        }
    }
    Ok(())
}
