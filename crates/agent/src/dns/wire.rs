//! Queries in, answers out. Nothing that a client sends can do more than get an error.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};
use std::net::IpAddr;

use super::table::Table;

/// What is done with a query.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is answered here, with these bytes.
    Answer(Vec<u8>),
    /// A resolver is asked; an answer over UDP may be that long.
    Forward {
        /// What the client can take over UDP.
        limit: usize,
    },
    /// It is no query: silence.
    Nothing,
}

/// Decides about a query. Without a table yet nothing is known, not even that a name is not of the mesh.
pub fn reply(table: Option<&Table>, query: &[u8], over_tcp: bool) -> Reply {
    // An answer must not be answered: two servers would talk for ever.
    if query.len() < HEADER || query[2] & 0x80 != 0 {
        return Reply::Nothing;
    }
    let Ok(message) = Message::from_vec(query) else {
        return Reply::Answer(error(query, ResponseCode::FormErr));
    };
    if message.metadata.op_code != OpCode::Query {
        return Reply::Answer(error(query, ResponseCode::NotImp));
    }
    let [question] = &message.queries[..] else {
        return Reply::Answer(error(query, ResponseCode::FormErr));
    };
    if message.version() > 0 {
        return bytes(respond(&message, ResponseCode::BADVERS), query, usize::MAX);
    }
    let limit = match over_tcp {
        true => usize::from(u16::MAX),
        false => usize::from(message.max_payload()),
    };
    let Some(table) = table else {
        return bytes(respond(&message, ResponseCode::ServFail), query, limit);
    };
    let v6 = match (question.query_class(), question.query_type()) {
        (DNSClass::IN, RecordType::A) => false,
        (DNSClass::IN, RecordType::AAAA) => true,
        // Of the mesh's names only addresses are known.
        _ => return Reply::Forward { limit },
    };
    let name = question.name().to_ascii().to_ascii_lowercase();
    let Some(found) = table.look_up(name.trim_end_matches('.'), v6) else {
        return Reply::Forward { limit };
    };
    let mut response = respond(&message, ResponseCode::NoError);
    let mut owner = question.name().clone();
    if let Some(alias) = found.alias {
        let Ok(mut target) = Name::from_ascii(&alias) else {
            return bytes(respond(&message, ResponseCode::ServFail), query, limit);
        };
        target.set_fqdn(true);
        let data = RData::CNAME(rdata::CNAME(target.clone()));
        response.add_answer(Record::from_rdata(owner, TTL, data));
        owner = target;
    }
    for ip in found.addresses {
        let data = match ip {
            IpAddr::V4(ip) => RData::A(rdata::A(ip)),
            IpAddr::V6(ip) => RData::AAAA(rdata::AAAA(ip)),
        };
        response.add_answer(Record::from_rdata(owner.clone(), TTL, data));
    }
    bytes(response, query, limit)
}

/// An answer of a resolver, fit for the client: its own id, and no longer than it can take.
pub(super) fn relay(mut answer: Vec<u8>, query: &[u8], limit: usize) -> Vec<u8> {
    answer[..2].copy_from_slice(&query[..2]);
    if answer.len() <= limit {
        return answer;
    }
    let cut = Message::from_vec(&answer)
        .ok()
        .and_then(|m| m.truncate().to_vec().ok());
    match cut {
        Some(cut) if cut.len() <= limit => cut,
        _ => error(query, ResponseCode::ServFail),
    }
}

/// Whether `answer` answers `query`: same question, and an answer at all. (Its id is checked by the sender.)
pub(super) fn answers(answer: &[u8], query: &[u8]) -> bool {
    if answer.len() < HEADER || answer[2] & 0x80 == 0 {
        return false;
    }
    let (Some(asked), Some(answered)) = (question(query), question(answer)) else {
        // Errors may come without the question.
        return answer[4..6] == [0, 0] && answer[3] & 0x0f != 0;
    };
    asked.eq_ignore_ascii_case(answered)
}

/// Whether another resolver may do better.
pub(super) fn failed(answer: &[u8]) -> bool {
    matches!(answer[3] & 0x0f, 2 | 4 | 5)
}

/// The bytes of the first question; compressed names do not occur there.
fn question(message: &[u8]) -> Option<&[u8]> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        match length {
            0 => return message.get(HEADER..at + 4),
            64.. => return None,
            _ => {}
        }
    }
}

/// An answer without records to whatever came.
pub(super) fn error(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    out[..2].copy_from_slice(&query[..2]);
    out[2] = 0x80 | query[2] & 0x79;
    out[3] = 0x80 | code.low();
    if let Some(question) = question(query) {
        out[5] = 1;
        out.extend(question);
    }
    out
}

fn respond(query: &Message, code: ResponseCode) -> Message {
    let mut out = Message::response(query.metadata.id, OpCode::Query);
    debug_assert_eq!(out.metadata.message_type, MessageType::Response);
    out.metadata.response_code = code;
    out.metadata.authoritative = code == ResponseCode::NoError;
    out.metadata.recursion_desired = query.metadata.recursion_desired;
    out.metadata.recursion_available = true;
    out.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        edns.set_rcode_high(code.high());
        out.set_edns(edns);
    }
    out
}

fn bytes(mut message: Message, query: &[u8], limit: usize) -> Reply {
    let fits = loop {
        match message.to_vec() {
            Ok(out) if out.len() <= limit => break out,
            Ok(out) => {
                // What does not fit is left out, and the client is told to ask over TCP.
                message.metadata.truncation = true;
                let over = out.len() - limit;
                let keep = message
                    .answers
                    .len()
                    .saturating_sub(over.div_ceil(28).max(1));
                if message.answers.is_empty() {
                    break error(query, ResponseCode::ServFail);
                }
                message.answers.truncate(keep);
            }
            Err(_) => break error(query, ResponseCode::ServFail),
        }
    };
    Reply::Answer(fits)
}

const HEADER: usize = 12;
/// Seconds, as pilot-agent has it.
const TTL: u32 = 30;
/// What passes every link in one piece.
const PAYLOAD: u16 = 1232;

#[cfg(test)]
mod tests;
