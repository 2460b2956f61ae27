//! `/listeners`: names and addresses.

use proto::envoy::admin::v3::{ListenerStatus, Listeners};

use super::{Admin, Answer, Params, clusters::address_message};

pub(super) fn listeners(admin: &Admin, params: &Params) -> Answer {
    let list = admin.server.listeners();
    match params.get("format") {
        Some("json") => {
            let listener_statuses = list
                .iter()
                .map(|(plan, addresses)| ListenerStatus {
                    name: plan.name.to_string(),
                    local_address: addresses.first().map(address_message),
                    additional_local_addresses: addresses
                        .iter()
                        .skip(1)
                        .map(address_message)
                        .collect(),
                })
                .collect();
            Answer::message(&Listeners { listener_statuses })
        }
        None | Some("" | "text") => {
            let lines = list.iter().map(|(plan, addresses)| {
                let all = addresses.iter().map(|a| format!("{}::{a}\n", plan.name));
                all.collect::<String>()
            });
            Answer::text(lines.collect::<String>())
        }
        Some(_) => Answer::text("usage: /listeners?format=(json|text)\n").status(400),
    }
}
