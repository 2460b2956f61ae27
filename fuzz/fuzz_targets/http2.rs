//! A conversation over HTTP/2: whatever a client sends, the server does not panic, ends when the client has ended, and
//! hands on only heads that can be written as HTTP/1.
#![no_main]

use std::time::Duration;

use bytes::Bytes;
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use outrigger_http::{Frame as BodyFrame, Framing, ResponseHead, h2};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    task::{JoinSet, LocalSet},
};

#[derive(Arbitrary, Debug)]
enum Sent {
    /// Bytes as they come.
    Raw(Vec<u8>),
    /// A frame of any kind.
    Frame { kind: u8, flags: u8, stream: u8, payload: Vec<u8> },
    /// A head that is one, but for fields of its own.
    Head { stream: u8, end: bool, fields: Vec<(u8, Vec<u8>)> },
    /// Data of a request.
    Data { stream: u8, end: bool, payload: Vec<u8> },
}

/// Fields that a client could do harm with.
const NAMES: [&str; 8] =
    ["connection", "transfer-encoding", "te", "host", "content-length", "x", ":path", "cookie"];

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

impl Sent {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Sent::Raw(bytes) => out.extend_from_slice(bytes),
            Sent::Frame { kind, flags, stream, payload } => {
                frame(out, kind % 12, *flags, u32::from(*stream), payload);
            }
            Sent::Head { stream, end, fields } => {
                // GET, http, "/" of the static table, and `:authority: a`.
                let mut block = vec![0x82, 0x86, 0x84, 0x41, 1, b'a'];
                for (name, value) in fields.iter().take(20) {
                    let name = NAMES[*name as usize % NAMES.len()];
                    let value = &value[..value.len().min(100)];
                    block.extend_from_slice(&[0, name.len() as u8]);
                    block.extend_from_slice(name.as_bytes());
                    block.push(value.len() as u8);
                    block.extend_from_slice(value);
                }
                frame(out, 1, 4 | u8::from(*end), u32::from(stream | 1), &block);
            }
            Sent::Data { stream, end, payload } => {
                frame(out, 0, u8::from(*end), u32::from(stream | 1), payload);
            }
        }
    }
}

async fn serve(near: tokio::io::DuplexStream) {
    let Ok(mut server) = h2::ServerConnection::handshake(near, &h2::Settings::default()).await else {
        return;
    };
    let mut streams = JoinSet::new();
    while let Ok(Some((head, mut reader, mut writer))) = server.accept().await {
        assert!(head.path().bytes().all(|byte| byte.is_ascii_graphic()), "{:?}", head.path());
        for (name, value) in head.headers.iter() {
            assert!(!name.is_empty() && !name.contains([' ', ':', '\r', '\n']), "{name:?}");
            assert!(!value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)), "{value:?}");
            assert!(!name.eq_ignore_ascii_case("connection"));
            assert!(!name.eq_ignore_ascii_case("transfer-encoding"));
        }
        streams.spawn_local(async move {
            let head = ResponseHead { framing: Framing::Chunked, ..ResponseHead::new(200) };
            let mut length = 0;
            while let Some(Ok(frame)) = std::future::poll_fn(|cx| reader.poll_frame(cx)).await {
                if let BodyFrame::Data(data) = frame {
                    length += data.len();
                }
            }
            let _ = writer.send_response(&head, head.framing);
            let _ = writer.send_data(Bytes::from(length.to_string()));
            let _ = writer.send_end(None);
        });
    }
}

fuzz_target!(|sent: Vec<Sent>| {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frame(&mut bytes, 4, 0, 0, &[]);
    sent.iter().for_each(|sent| sent.write(&mut bytes));
    // Time stands still, so a limit of time is met only when nobody can go on.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("it builds");
    LocalSet::new().block_on(&runtime, async {
        let (near, far) = duplex(1 << 20);
        let (mut answers, mut requests) = tokio::io::split(far);
        let client = async {
            let _ = requests.write_all(&bytes).await;
            let _ = requests.shutdown().await;
        };
        let reader = async {
            let mut nothing = Vec::new();
            let _ = answers.read_to_end(&mut nothing).await;
        };
        let all = async { tokio::join!(client, serve(near), reader) };
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("the server ends with its client");
    });
});
