//! Records of requests that go to services: access logs and spans.

use std::{
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use proto::{
    envoy::{
        data::accesslog::v3::{AccessLogType, http_access_log_entry::HttpVersion},
        service::accesslog::v3::{StreamAccessLogsMessage, stream_access_logs_message::LogEntries},
    },
    opentelemetry::proto::{
        collector::{logs::v1::ExportLogsServiceRequest, trace::v1::ExportTraceServiceRequest},
        common::v1::{AnyValue, KeyValue, any_value::Value},
        trace::v1::{span::SpanKind, status::StatusCode},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

use super::{
    grpc::{Seen, server},
    support::{Act, Mesh, Origin, TO_A, run, within},
};

/// The calls that a service has got, once there are so many: their heads and messages.
async fn calls(seen: &Seen, count: usize) -> Vec<(String, Vec<u8>)> {
    within(async {
        while seen.borrow().len() < count {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let calls = seen.borrow();
    let each = calls
        .iter()
        .map(|(head, body)| (head.clone(), body[5..].to_vec()));
    each.collect()
}

/// Waits until a stat has this value.
async fn counted(mesh: &Mesh, name: &str, value: i64) {
    within(async {
        while mesh.server.store.number(name) != value {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

const ANSWER: Act = Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-R: r\r\n\r\nok");

#[test]
fn a_log_service_gets_records_of_requests() {
    run(async {
        let (port, seen) = server().await;
        let origin = Origin::new(&[ANSWER]).await;
        let log = "name: als
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig
          common_config:
            log_name: requests
            transport_api_version: V3
            grpc_service: {envoy_grpc: {cluster_name: s-h2}}
            buffer_flush_interval: 0.01s
            custom_tags:
            - {tag: who, request_header: {name: x-who, default_value: nobody}}
            - {tag: what, literal: {value: that}}
            - {tag: none, request_header: {name: x-none}}
            - {tag: code, value: 'is %RESPONSE_CODE%'}
          additional_request_headers_to_log: [x-Q, x-none]
          additional_response_headers_to_log: [x-r]";
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::with_log(TO_A, "", log, &clusters).await;
        let request = "POST /p?q=1 HTTP/1.1\r\nHost: h\r\nX-Q: one\r\nX-Q: two\r\nUser-Agent: u\r\n\
                       Content-Length: 3\r\nConnection: close\r\n\r\nabc";
        mesh.ask(request).await;
        let (head, message) = calls(&seen, 1).await.remove(0);
        let path = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs ";
        assert!(head.starts_with(path), "{head}");
        let message = StreamAccessLogsMessage::decode(&*message).unwrap();
        assert_eq!(message.identifier.unwrap().log_name, "requests");
        let Some(LogEntries::HttpLogs(entries)) = message.log_entries else {
            panic!("they are of requests");
        };
        let [entry] = &*entries.log_entry else {
            panic!("one request, one record: {entries:?}");
        };
        assert_eq!(entry.protocol_version(), HttpVersion::Http11);
        let request = entry.request.as_ref().unwrap();
        assert_eq!(request.request_method().as_str_name(), "POST");
        assert_eq!(
            (&*request.authority, &*request.path, &*request.user_agent),
            ("h", "/p?q=1", "u")
        );
        assert_eq!(request.request_body_bytes, 3);
        assert_eq!(request.request_headers.len(), 1);
        assert_eq!(request.request_headers["x-q"], "one,two");
        let response = entry.response.as_ref().unwrap();
        assert_eq!(
            (response.response_code, response.response_body_bytes),
            (Some(200), 2)
        );
        assert_eq!(response.response_code_details, "via_upstream");
        assert_eq!(response.response_headers["x-r"], "r");
        let common = entry.common_properties.as_ref().unwrap();
        assert_eq!(common.upstream_cluster, "a");
        assert_eq!(common.access_log_type(), AccessLogType::DownstreamEnd);
        assert!(common.response_flags.is_none() && common.tls_properties.is_none());
        assert!(common.upstream_remote_address.is_some() && common.start_time.is_some());
        let tags: Vec<_> = common
            .custom_tags
            .iter()
            .map(|(n, v)| (&**n, &**v))
            .collect();
        assert_eq!(
            tags,
            [("code", "is 200"), ("what", "that"), ("who", "nobody")]
        );
        counted(&mesh, "access_logs.grpc_access_log.logs_written", 1).await;
    });
}

#[test]
fn records_that_nobody_takes_are_counted_and_hold_up_nobody() {
    run(async {
        let origin = Origin::new(&[ANSWER, ANSWER]).await;
        let closed = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let log = "name: als
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig
          common_config: {log_name: l, grpc_service: {envoy_grpc: {cluster_name: s-h2}}, buffer_size_bytes: 0}";
        let clusters = [("a", origin.port), ("s-h2", closed)];
        let mesh = Mesh::with_log(TO_A, "", log, &clusters).await;
        for _ in 0..2 {
            assert!(mesh.get("/").await.ends_with("ok"));
        }
        counted(&mesh, "access_logs.grpc_access_log.logs_dropped", 2).await;
        assert_eq!(
            mesh.server
                .store
                .number("access_logs.grpc_access_log.logs_written"),
            0
        );
    });
}

#[test]
fn a_collector_gets_log_records_as_they_were_asked_for() {
    run(async {
        let (port, seen) = server().await;
        let origin = Origin::new(&[ANSWER]).await;
        let log = "name: otel
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig
          common_config:
            log_name: lines
            transport_api_version: V3
            grpc_service: {envoy_grpc: {cluster_name: s-h2, authority: otel.example}}
            buffer_flush_interval: 0.01s
          buffer_flush_interval: 0.02s
          log_name: own lines
          stat_prefix: own
          resource_attributes: {values: [{key: service.name, value: {string_value: '%REQ(x)%'}}]}
          body: {string_value: '%REQ(:METHOD)% %RESPONSE_CODE% %REQ(x-none)%'}
          attributes:
            values:
            - {key: code, value: {string_value: '%RESPONSE_CODE%'}}
            - {key: number, value: {int_value: 7}}
            - {key: list, value: {array_value: {values: [{bool_value: true}, {double_value: 2}]}}}";
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::with_log(TO_A, "", log, &clusters).await;
        mesh.get("/").await;
        let (head, message) = calls(&seen, 1).await.remove(0);
        let path = "/opentelemetry.proto.collector.logs.v1.LogsService/Export ";
        assert!(
            head.starts_with(path) && head.contains("\"host\": \"otel.example\""),
            "{head}"
        );
        let mut message = ExportLogsServiceRequest::decode(&*message).unwrap();
        let logs = message.resource_logs.remove(0);
        let text = |text: &str| AnyValue {
            value: Some(Value::StringValue(text.to_owned())),
        };
        let resource = logs.resource.unwrap().attributes;
        let of = |list: &[KeyValue], key: &str| {
            let found = list.iter().find(|pair| pair.key == key);
            found.and_then(|pair| pair.value.clone())
        };
        assert_eq!(of(&resource, "log_name"), Some(text("own lines")));
        // The resource is no template.
        assert_eq!(of(&resource, "service.name"), Some(text("%REQ(x)%")));
        let record = &logs.scope_logs[0].log_records[0];
        assert_eq!(record.body, Some(text("GET 200 -")));
        assert!(record.time_unix_nano > 1_600_000_000_000_000_000);
        assert_eq!(of(&record.attributes, "code"), Some(text("200")));
        let number = of(&record.attributes, "number").unwrap();
        assert_eq!(number.value, Some(Value::IntValue(7)));
        let Some(Value::ArrayValue(list)) = of(&record.attributes, "list").unwrap().value else {
            panic!("it is a list");
        };
        assert_eq!(list.values[0].value, Some(Value::BoolValue(true)));
        assert_eq!(list.values[1].value, Some(Value::DoubleValue(2.0)));
        counted(
            &mesh,
            "access_logs.open_telemetry_access_log.own.logs_written",
            1,
        )
        .await;
    });
}

/// An HTTP server that takes one POST after the other, each with its head and body.
async fn http_collector() -> (u16, tokio::sync::mpsc::UnboundedReceiver<(String, Vec<u8>)>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, receiver) = unbounded_channel();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = Vec::new();
            loop {
                let head = bytes.windows(4).position(|four| four == b"\r\n\r\n");
                if let Some(end) = head {
                    let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
                    let length = header(&text, "content-length").unwrap().parse::<usize>();
                    let all = end + 4 + length.unwrap();
                    if bytes.len() >= all {
                        sender.send((text, bytes[end + 4..all].to_vec())).unwrap();
                        bytes.drain(..all);
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                        stream.write_all(answer).await.unwrap();
                        continue;
                    }
                }
                if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                    break;
                }
            }
        }
    });
    (port, receiver)
}

#[test]
fn a_collector_needs_no_common_configuration() {
    run(async {
        let (port, seen) = server().await;
        let origin = Origin::new(&[ANSWER]).await;
        let log = "name: otel
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig
          grpc_service: {envoy_grpc: {cluster_name: s-h2, authority: otel.example}}
          disable_builtin_labels: true
          body: {string_value: '%RESPONSE_CODE%'}
          buffer_size_bytes: 0";
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::with_log(TO_A, "", log, &clusters).await;
        mesh.get("/").await;
        let (head, message) = calls(&seen, 1).await.remove(0);
        assert!(head.contains("\"host\": \"otel.example\""), "{head}");
        let mut message = ExportLogsServiceRequest::decode(&*message).unwrap();
        let logs = message.resource_logs.remove(0);
        assert!(logs.resource.unwrap().attributes.is_empty());
        let record = &logs.scope_logs[0].log_records[0];
        let body = record.body.as_ref().and_then(|body| body.value.as_ref());
        assert_eq!(body, Some(&Value::StringValue("200".to_owned())));
        // It is not traced.
        assert!(record.trace_id.is_empty() && record.span_id.is_empty());
    });
}

#[test]
fn a_collector_of_http_gets_records_with_state_tags_and_trace() {
    run(async {
        let (port, mut seen) = http_collector().await;
        let origin = Origin::new(&[ANSWER]).await;
        let (spans, _) = server().await;
        let log = "name: otel
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig
          log_name: lines
          http_service:
            http_uri: {uri: 'http://otel.example:4318/v1/logs', cluster: logs, timeout: 1s}
            request_headers_to_add: [{header: {key: authorization, value: 'secret %ENVIRONMENT(PATH):1%%%'}}, {header: {key: x-none, value: '%ENVIRONMENT(NO_SUCH_VARIABLE_)%'}}]
          buffer_flush_interval: 0.01s
          buffer_size_bytes: 1000
          filter_state_objects_to_log: [downstream_peer, none]
          custom_tags:
          - {tag: who, request_header: {name: x-who}}
          - {tag: none, request_header: {name: x-none}}
          resource_detectors:
          - {name: fixed, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig, attributes: {zone_name: detected, place: detected}}}
          resource_attributes: {values: [{key: place, value: {string_value: written}}]}";
        let filter = "      - name: peer
        typed_config: {\"@type\": type.googleapis.com/io.istio.http.peer_metadata.Config, downstream_discovery: [{istio_headers: {}}]}";
        let clusters = [("a", origin.port), ("logs", port), ("s-h2", spans)];
        let mesh = Mesh::with_log_and_filters(OTEL, filter, log, &clusters).await;
        use proto::prost_types::{Struct, Value as Member, value::Kind};
        let kind = Some(Kind::StringValue("shop".to_owned()));
        let peer = Struct {
            fields: [("NAMESPACE".to_owned(), Member { kind })].into(),
        };
        use base64::Engine;
        let peer = base64::prelude::BASE64_STANDARD.encode(peer.encode_to_vec());
        mesh.ask(&format!(
            "GET / HTTP/1.1\r\nHost: h\r\nX-Who: me\r\nx-envoy-peer-metadata-id: p\r\nx-envoy-peer-metadata: {peer}\r\n\
             traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nConnection: close\r\n\r\n"
        ))
        .await;
        let (head, body) = within(seen.recv()).await.expect("one call");
        assert!(head.starts_with("POST /v1/logs HTTP/1.1\r\n"), "{head}");
        let first = std::env::var("PATH").expect("it is set").remove(0);
        for (name, value) in [
            ("host", "otel.example:4318"),
            ("content-type", "application/x-protobuf"),
            ("authorization", &*format!("secret {first}%")),
        ] {
            assert_eq!(header(&head, name), Some(value), "{head}");
        }
        assert_eq!(header(&head, "x-none"), None);
        let mut message = ExportLogsServiceRequest::decode(&*body).unwrap();
        let logs = message.resource_logs.remove(0);
        let list = |list: &[KeyValue]| -> Vec<(String, String)> {
            let text = |pair: &KeyValue| match pair.value.as_ref().unwrap().value.as_ref() {
                Some(Value::StringValue(text)) => text.clone(),
                other => panic!("{other:?}"),
            };
            list.iter().map(|p| (p.key.clone(), text(p))).collect()
        };
        let resource = list(&logs.resource.unwrap().attributes);
        let told: Vec<_> = resource.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(
            told,
            [
                ("log_name", "lines"),
                ("zone_name", "detected"),
                ("cluster_name", ""),
                ("node_name", ""),
                ("place", "written"),
            ]
        );
        let record = &logs.scope_logs[0].log_records[0];
        let attributes = list(&record.attributes);
        let names: Vec<_> = attributes.iter().map(|(key, _)| &**key).collect();
        assert_eq!(names, ["downstream_peer", "who"]);
        assert!(attributes[0].1.contains("\"shop\""), "{attributes:?}");
        assert_eq!(attributes[1].1, "me");
        let hex = |bytes: &[u8]| tls::certificate::hex(bytes);
        assert_eq!(hex(&record.trace_id), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(record.span_id.len(), 8);
        assert_ne!(
            hex(&record.span_id),
            "b7ad6b7169203331",
            "the span is its own"
        );
        let written = "access_logs.open_telemetry_access_log.logs_written";
        counted(&mesh, written, 1).await;
    });
}

/// The value of a header in what an origin was sent.
fn header<'t>(request: &'t str, name: &str) -> Option<&'t str> {
    request.lines().find_map(|line| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name).then_some(value)
    })
}

const OTEL: &str = "tracing:
        random_sampling: {value: 100}
        max_path_tag_length: 5
        custom_tags:
        - {tag: who, request_header: {name: x-who}}
        - {tag: where, metadata: {kind: {route: {}}, metadata_key: {key: own, path: [{key: place}]}}}
        provider:
          name: otel
          typed_config:
            \"@type\": type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig
            grpc_service: {envoy_grpc: {cluster_name: s-h2}}
            service_name: shop
            resource_detectors:
            - {name: fixed, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig, attributes: {a: b}}}";

const ROUTE: &str = "          - match: {prefix: /}
            route: {cluster: a}
            decorator: {operation: 'shop:80/*'}
            metadata: {filter_metadata: {own: {place: here}}}";

#[test]
fn a_trace_can_end_at_the_mesh() {
    run(async {
        let (port, seen) = server().await;
        let origin = Origin::new(&[ANSWER]).await;
        let clusters = [("a", origin.port), ("s-h2", port)];
        let quiet = OTEL.replacen(
            "tracing:",
            "tracing:\n        no_context_propagation: true",
            1,
        );
        let mesh = Mesh::new(ROUTE, &quiet, "", &clusters).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 200 "));
        assert_eq!(header(&origin.seen()[0], "traceparent"), None);
        let (_, message) = calls(&seen, 1).await.remove(0);
        let message = ExportTraceServiceRequest::decode(&*message).unwrap();
        assert_eq!(message.resource_spans[0].scope_spans[0].spans.len(), 1);
    });
}

#[test]
fn a_trace_goes_on_and_its_span_is_collected() {
    run(async {
        let (port, seen) = server().await;
        let broken = Act::Say("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[ANSWER, ANSWER, broken]).await;
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::new(ROUTE, OTEL, "", &clusters).await;
        let (id, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        // One that the client does not want recorded is told on and not recorded.
        for flags in ["00", "01"] {
            let told = format!("traceparent: 00-{id}-{parent}-{flags}\r\ntracestate: a=b");
            let request = format!(
                "GET /long/path HTTP/1.1\r\nHost: h\r\nX-Who: me\r\n{told}\r\nConnection: close\r\n\r\n"
            );
            assert!(mesh.ask(&request).await.starts_with("HTTP/1.1 200 "));
        }
        // One that begins here.
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 503 "));
        let requests = origin.seen();
        let told: Vec<Vec<&str>> = requests
            .iter()
            .map(|request| header(request, "traceparent").unwrap().split('-').collect())
            .collect();
        for (told, flags) in told.iter().zip(["00", "01", "01"]) {
            assert_eq!((told[0], told[3]), ("00", flags));
            assert_ne!(told[2], parent);
        }
        assert_eq!((told[0][1], told[1][1]), (id, id));
        assert!(told[2][1] != id && told[2][1].len() == 32);
        assert_eq!(header(&requests[1], "tracestate"), Some("a=b"));

        let (head, message) = calls(&seen, 1).await.remove(0);
        let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export ";
        assert!(head.starts_with(path), "{head}");
        let mut message = ExportTraceServiceRequest::decode(&*message).unwrap();
        let spans = message.resource_spans.remove(0);
        let tag = |list: &[KeyValue], key: &str| {
            let found = list.iter().find(|pair| pair.key == key)?;
            match found.value.as_ref()?.value.as_ref()? {
                Value::StringValue(text) => Some(text.clone()),
                other => panic!("{key} is {other:?}"),
            }
        };
        let resource = spans.resource.unwrap().attributes;
        assert_eq!(tag(&resource, "service.name").as_deref(), Some("shop"));
        assert_eq!(tag(&resource, "a").as_deref(), Some("b"));
        let [good, bad] = &*spans.scope_spans[0].spans else {
            panic!("two are recorded: {spans:?}", spans = spans.scope_spans);
        };
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(
            (&*hex(&good.trace_id), &*hex(&good.parent_span_id)),
            (id, parent)
        );
        assert_eq!(hex(&good.span_id), told[1][2]);
        assert_eq!((&*good.name, &*good.trace_state), ("shop:80/*", "a=b"));
        assert_eq!(good.kind(), SpanKind::Server);
        assert!(good.end_time_unix_nano > good.start_time_unix_nano && good.status.is_none());
        for (key, value) in [
            ("component", "proxy"),
            ("http.url", "http://h/long"),
            ("http.method", "GET"),
            ("http.status_code", "200"),
            ("http.protocol", "HTTP/1.1"),
            ("upstream_cluster", "a"),
            ("response_flags", "-"),
            ("user_agent", "-"),
            ("response_size", "2"),
            ("who", "me"),
            ("where", "here"),
        ] {
            assert_eq!(tag(&good.attributes, key).as_deref(), Some(value), "{key}");
        }
        assert_eq!(tag(&good.attributes, "error"), None);
        assert_eq!(
            (hex(&bad.trace_id), hex(&bad.span_id)),
            (told[2][1].into(), told[2][2].into())
        );
        assert!(bad.parent_span_id.is_empty());
        assert_eq!(bad.status.as_ref().unwrap().code(), StatusCode::Error);
        assert_eq!(tag(&bad.attributes, "error").as_deref(), Some("true"));
        assert_eq!(tag(&bad.attributes, "who"), None);
        counted(&mesh, "tracing.opentelemetry.spans_sent", 2).await;
    });
}

#[test]
fn log_lines_tell_the_trace_and_what_expressions_give() {
    run(async {
        let origin = Origin::new(&[ANSWER]).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = format!(
            "name: ids
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
          path: {}
          log_format:
            formatters: [{{name: cel, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.formatter.cel.v3.Cel}}}}]
            text_format_source: {{inline_string: \"%TRACE_ID% %SPAN_ID% %CEL(response.code)% %CEL(request.headers['x-who'])% %CEL(request.headers['x-none'])%\\n\"}}",
            path.display()
        );
        let clusters = [("a", origin.port), ("s-h2", 1)];
        let mesh = Mesh::with_log(ROUTE, OTEL, &log, &clusters).await;
        let id = "0af7651916cd43dd8448eb211c80319c";
        let request = format!(
            "GET / HTTP/1.1\r\nHost: h\r\nX-Who: me\r\ntraceparent: 00-{id}-b7ad6b7169203331-00\r\nConnection: close\r\n\r\n"
        );
        mesh.ask(&request).await;
        let line = within(async {
            loop {
                match std::fs::read_to_string(&path) {
                    Ok(line) if line.ends_with('\n') => return line,
                    _ => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        })
        .await;
        let told = origin.seen().remove(0);
        let span = header(&told, "traceparent")
            .unwrap()
            .split('-')
            .nth(2)
            .unwrap()
            .to_owned();
        assert_eq!(line, format!("{id} {span} 200 me -\n"));
    });
}

#[test]
fn zipkin_gets_a_span_of_each_end() {
    run(async {
        let zipkin = Origin::new(&[Act::Say(
            "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n",
        )])
        .await;
        let origin = Origin::new(&[ANSWER, ANSWER]).await;
        let tracing = "tracing:
        spawn_upstream_span: true
        provider:
          name: zipkin
          typed_config:
            \"@type\": type.googleapis.com/envoy.config.trace.v3.ZipkinConfig
            collector_cluster: z
            collector_endpoint: /api/v2/spans
            collector_hostname: zipkin.example
            collector_endpoint_version: HTTP_JSON
            trace_id_128bit: true
            shared_span_context: false";
        let clusters = [("a", origin.port), ("z", zipkin.port)];
        let mesh = Mesh::new(TO_A, tracing, "", &clusters).await;
        let (id, parent) = ("463ac35c9f6413ad48485a3953bb6124", "a2fb4a1d1a96d312");
        for sampled in ["0", "1"] {
            let request = format!(
                "GET / HTTP/1.1\r\nHost: h\r\nX-B3-TraceId: {id}\r\nX-B3-SpanId: {parent}\r\nX-B3-Sampled: {sampled}\r\nConnection: close\r\n\r\n"
            );
            mesh.ask(&request).await;
        }
        let requests = origin.seen();
        assert_eq!(header(&requests[0], "x-b3-sampled"), Some("0"));
        assert_eq!(header(&requests[0], "x-b3-traceid"), Some(id));
        assert_eq!(header(&requests[1], "x-b3-sampled"), Some("1"));
        within(async {
            while zipkin.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
        let report = zipkin.seen().remove(0);
        let (head, body) = report.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("POST /api/v2/spans HTTP/1.1\r\n"),
            "{head}"
        );
        assert_eq!(header(head, "host"), Some("zipkin.example"));
        let spans: serde_json::Value = serde_json::from_str(body).unwrap();
        let (own, child) = (&spans[0], &spans[1]);
        assert_eq!(spans.as_array().unwrap().len(), 2, "{spans}");
        assert_eq!(
            (&own["traceId"], &own["parentId"]),
            (&id.into(), &parent.into())
        );
        assert_eq!(
            (&own["kind"], &own["name"]),
            (&"SERVER".into(), &"ingress".into())
        );
        assert_eq!(
            (&child["kind"], &child["name"]),
            (&"CLIENT".into(), &"router a egress".into())
        );
        assert_eq!(
            (&child["parentId"], &child["traceId"]),
            (&own["id"], &id.into())
        );
        // The server is told the span of its own call.
        assert_eq!(header(&requests[1], "x-b3-spanid"), child["id"].as_str());
        assert_eq!(
            header(&requests[1], "x-b3-parentspanid"),
            own["id"].as_str()
        );
        assert_eq!(own["tags"]["http.status_code"], "200");
        assert!(own["duration"].as_u64() > Some(0) && own["timestamp"].is_u64());
        counted(&mesh, "tracing.zipkin.spans_sent", 2).await;
    });
}

/// As [`server`], on a thread that goes on while the proxy ends: its port, and the calls as they come.
fn elsewhere() -> (u16, UnboundedReceiver<(String, Vec<u8>)>) {
    let ((says_port, port), (says, called)) = (std::sync::mpsc::channel(), unbounded_channel());
    thread::spawn(move || {
        run(async move {
            let (port, seen) = server().await;
            says_port.send(port).unwrap();
            while !says.is_closed() {
                seen.take().into_iter().for_each(|call| {
                    let _ = says.send(call);
                });
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
    });
    (port.recv().unwrap(), called)
}

/// A log that keeps records back for longer than any test.
const KEPT: &str = "name: als
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig
          common_config:
            log_name: last
            grpc_service: {envoy_grpc: {cluster_name: s-h2}}
            buffer_flush_interval: 3600s";

#[test]
fn records_that_still_wait_when_the_proxy_ends_are_delivered() {
    run(async {
        let (port, mut called) = elsewhere();
        let origin = Origin::new(&[ANSWER, Act::Hang]).await;
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::with_log(ROUTE, OTEL, KEPT, &clusters).await;
        mesh.get("/done").await;
        // The end of the proxy is its end.
        let mut unfinished = mesh.connect().await;
        let request = b"GET /begun HTTP/1.1\r\nHost: h\r\n\r\n";
        unfinished.write_all(request).await.unwrap();
        within(async {
            while origin.seen().len() < 2 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
        mesh.server.shut_down();
        let (mut logged, mut traced) = (Vec::new(), 0);
        while logged.len() < 2 || traced < 2 {
            let (head, message) = within(called.recv()).await.unwrap();
            if head.starts_with("/envoy.service.accesslog.v3.AccessLogService/") {
                let message = StreamAccessLogsMessage::decode(&message[5..]).unwrap();
                let Some(LogEntries::HttpLogs(entries)) = message.log_entries else {
                    panic!("they are of requests");
                };
                let paths = entries.log_entry.into_iter().map(|entry| entry.request);
                logged.extend(paths.map(|request| request.unwrap().path));
            } else {
                let message = ExportTraceServiceRequest::decode(&message[5..]).unwrap();
                traced += message.resource_spans[0].scope_spans[0].spans.len();
            }
        }
        assert_eq!(logged, ["/done", "/begun"]);
        assert_eq!(traced, 2);
    });
}

#[test]
fn a_service_that_does_not_answer_holds_up_the_end_for_a_second_at_most() {
    run(async {
        let origin = Origin::new(&[ANSWER]).await;
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let clusters = [("a", origin.port), ("s-h2", port)];
        let mesh = Mesh::with_log(TO_A, "", KEPT, &clusters).await;
        assert!(mesh.get("/").await.ends_with("ok"));
        let begun = Instant::now();
        mesh.server.shut_down();
        // More than a second: the machine may be busy. The call itself has no timeout.
        assert!(begun.elapsed() < Duration::from_secs(10));
        // It was asked.
        let (mut stream, _) = silent.accept().unwrap();
        let mut preface = [0; 24];
        std::io::Read::read_exact(&mut stream, &mut preface).unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    });
}
