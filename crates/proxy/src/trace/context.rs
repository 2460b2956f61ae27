//! The place of a request in a trace, in the headers of W3C trace context and of B3.

use std::fmt::Write;

use outrigger_http::Headers;

use crate::{http::Exchange, plan::tracing::TracerKind, worker::Worker};

/// The place of a request in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    /// The trace. Of 64 bits where the upper half is 0.
    pub(crate) id: u128,
    /// Our span.
    pub(crate) span: u64,
    /// The span that it is part of.
    pub(crate) parent: Option<u64>,
    /// The client has the same span.
    pub(crate) shared: bool,
    /// The trace is recorded.
    pub(crate) sampled: bool,
    /// The span of the last attempt, where it has one of its own.
    pub(crate) child: Option<u64>,
}

/// What the client says of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    id: u128,
    span: u64,
    parent: Option<u64>,
    /// `None` leaves it to us.
    sampled: Option<bool>,
}

impl Trace {
    /// Takes the place that the client says, or begins a trace.
    pub(super) fn of(kind: &TracerKind, exchange: &Exchange<'_>, worker: &Worker) -> Trace {
        let headers = &exchange.request.headers;
        let (told, wide, shared, said) = match kind {
            TracerKind::OpenTelemetry { .. } => (w3c(headers), true, false, None),
            TracerKind::Zipkin {
                wide,
                shared,
                w3c: also,
            } => {
                let told = b3(headers).or_else(|| w3c(headers).filter(|_| *also));
                // A decision may come without a trace.
                (told, *wide, *shared, b3_decision(headers))
            }
        };
        let Some(told) = told else {
            let high = if wide {
                u128::from(new_id(worker)) << 64
            } else {
                0
            };
            let low = new_id(worker);
            return Trace {
                id: high | u128::from(low),
                span: low,
                parent: None,
                shared: false,
                sampled: said.unwrap_or(exchange.traced),
                child: None,
            };
        };
        let sampled = told.sampled.unwrap_or(exchange.traced);
        let (span, parent) = match shared {
            true => (told.span, told.parent),
            false => (new_id(worker), Some(told.span)),
        };
        Trace {
            id: told.id,
            span,
            parent,
            shared,
            sampled,
            child: None,
        }
    }

    /// Tells the next one, in place of what the client has told us.
    pub(super) fn tell(&self, kind: &TracerKind, headers: &mut Headers) {
        let (span, parent) = match self.child {
            Some(child) => (child, Some(self.span)),
            None => (self.span, self.parent),
        };
        let mut text = Text::default();
        let w3c = match kind {
            TracerKind::OpenTelemetry { .. } => true,
            TracerKind::Zipkin { w3c, .. } => {
                match self.id >> 64 {
                    0 => text.fill(format_args!("{:016x}", self.id)),
                    _ => text.fill(format_args!("{:032x}", self.id)),
                }
                headers.set("x-b3-traceid", text.bytes());
                text.fill(format_args!("{span:016x}"));
                headers.set("x-b3-spanid", text.bytes());
                if let Some(parent) = parent {
                    text.fill(format_args!("{parent:016x}"));
                    headers.set("x-b3-parentspanid", text.bytes());
                }
                headers.set("x-b3-sampled", if self.sampled { "1" } else { "0" });
                // Two tellings of one trace could differ.
                headers.remove("b3");
                *w3c
            }
        };
        if w3c {
            let flags = u8::from(self.sampled);
            text.fill(format_args!("00-{:032x}-{span:016x}-{flags:02x}", self.id));
            headers.set("traceparent", text.bytes());
        }
    }
}

/// An identifier that nobody has; never 0, which means none.
pub(super) fn new_id(worker: &Worker) -> u64 {
    worker.random.bits().max(1)
}

/// `traceparent` (W3C Trace Context, 3.2). One that is broken is as none.
fn w3c(headers: &Headers) -> Option<Told> {
    let value = headers.get_str("traceparent")?;
    let mut parts = value.split('-');
    let mut part = || parts.next();
    let (version, id, span, flags) = (part()?, part()?, part()?, part()?);
    let more = part().is_some();
    let known = match number(version, 2)? {
        0xff => false,
        0 => !more,
        // Later versions may say more.
        _ => true,
    };
    let (id, span) = (number(id, 32)?, number(span, 16)?);
    let flags = number(flags, 2)?;
    (known && id != 0 && span != 0).then_some(Told {
        id,
        span: span as u64,
        parent: None,
        sampled: Some(flags & 1 == 1),
    })
}

/// B3, in one header or in several.
fn b3(headers: &Headers) -> Option<Told> {
    if let Some(value) = headers.get_str("b3") {
        let mut parts = value.split('-');
        let (id, span) = (parts.next()?, parts.next()?);
        let sampled = parts.next().and_then(decision);
        return Some(Told {
            id: trace_id(id)?,
            span: number(span, 16)? as u64,
            parent: parts
                .next()
                .and_then(|parent| Some(number(parent, 16)? as u64)),
            sampled,
        });
    }
    let of = |name| headers.get_str(name);
    let parent = of("x-b3-parentspanid").and_then(|parent| number(parent, 16));
    Some(Told {
        id: trace_id(of("x-b3-traceid")?)?,
        span: number(of("x-b3-spanid")?, 16)? as u64,
        parent: parent
            .map(|parent| parent as u64)
            .filter(|parent| *parent != 0),
        sampled: b3_decision(headers),
    })
}

/// What B3 says about recording.
fn b3_decision(headers: &Headers) -> Option<bool> {
    if let Some(value) = headers.get_str("b3") {
        let alone = !value.contains('-');
        return decision(value).filter(|_| alone);
    }
    match headers.get_str("x-b3-flags") {
        Some("1") => Some(true),
        _ => headers.get_str("x-b3-sampled").and_then(decision),
    }
}

fn decision(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "d" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn trace_id(text: &str) -> Option<u128> {
    number(text, 32)
        .or_else(|| number(text, 16))
        .filter(|id| *id != 0)
}

/// A number of exactly so many hexadecimal digits.
fn number(text: &str, digits: usize) -> Option<u128> {
    let whole = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(text, 16).ok().filter(|_| whole)
}

/// A header's value without an allocation: 55 characters are the longest.
#[derive(Default)]
struct Text(smallvec::SmallVec<[u8; 64]>);

impl Text {
    fn fill(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.clear();
        // Writing into memory cannot fail.
        let _ = self.write_fmt(text);
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&str, &str)]) -> Headers {
        list.iter().copied().collect()
    }

    #[test]
    fn trace_context_is_read_strictly() {
        let told = |value: &str| w3c(&headers(&[("traceparent", value)]));
        let (id, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let good = told(&format!("00-{id}-{span}-01")).unwrap();
        assert_eq!(
            (good.id, good.span),
            (0x0af7651916cd43dd8448eb211c80319c, 0xb7ad6b7169203331)
        );
        assert_eq!(good.sampled, Some(true));
        assert_eq!(
            told(&format!("00-{id}-{span}-00")).unwrap().sampled,
            Some(false)
        );
        assert!(told(&format!("01-{id}-{span}-03-more")).is_some());
        for wrong in [
            format!("ff-{id}-{span}-01"),
            format!("00-{id}-{span}-01-more"),
            format!("00-{id}-{span}"),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{id}-{}-01", "0".repeat(16)),
            format!("00-+{}-{span}-01", &id[1..]),
            format!("00-{id}-{span}-1"),
            String::new(),
        ] {
            assert_eq!(told(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn b3_is_read_from_one_header_and_from_several() {
        let (id, span, parent) = (
            "463ac35c9f6413ad48485a3953bb6124",
            "a2fb4a1d1a96d312",
            "0020000000000001",
        );
        let one = format!("{id}-{span}-1-{parent}");
        let several = [
            ("x-b3-traceid", id),
            ("x-b3-spanid", span),
            ("x-b3-parentspanid", parent),
            ("x-b3-sampled", "1"),
        ];
        let told = b3(&headers(&[("b3", &one)])).unwrap();
        assert_eq!(Some(told), b3(&headers(&several)));
        assert_eq!(
            (told.sampled, told.parent),
            (Some(true), Some(0x0020000000000001))
        );
        // Of 64 bits, and without a decision.
        let short = b3(&headers(&[("b3", &format!("{span}-{span}"))])).unwrap();
        assert_eq!((short.id, short.sampled), (0xa2fb4a1d1a96d312, None));
        // A decision alone.
        assert_eq!(b3(&headers(&[("b3", "0")])), None);
        assert_eq!(b3_decision(&headers(&[("b3", "0")])), Some(false));
        assert_eq!(b3_decision(&headers(&[("x-b3-flags", "1")])), Some(true));
        assert_eq!(b3(&headers(&[("x-b3-traceid", id)])), None);
    }

    #[test]
    fn what_was_told_is_told_on_with_our_span() {
        let trace = Trace {
            id: 0x0af7651916cd43dd8448eb211c80319c,
            span: 7,
            parent: Some(3),
            shared: false,
            sampled: true,
            child: None,
        };
        let mut told = headers(&[("B3", "0"), ("Traceparent", "old"), ("tracestate", "a=b")]);
        let both = TracerKind::Zipkin {
            wide: false,
            shared: false,
            w3c: true,
        };
        trace.tell(&both, &mut told);
        let of = |name| told.get_str(name);
        assert_eq!(of("b3"), None);
        assert_eq!(of("x-b3-traceid"), Some("0af7651916cd43dd8448eb211c80319c"));
        assert_eq!(of("x-b3-spanid"), Some("0000000000000007"));
        assert_eq!(of("x-b3-parentspanid"), Some("0000000000000003"));
        assert_eq!(of("x-b3-sampled"), Some("1"));
        let parent = "00-0af7651916cd43dd8448eb211c80319c-0000000000000007-01";
        assert_eq!(of("traceparent"), Some(parent));
        assert_eq!(of("tracestate"), Some("a=b"));
    }
}
