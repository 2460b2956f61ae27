//! Istio's exchange of workload metadata at the head of a TCP stream (ALPN `istio-peer-exchange`).
//!
//! Each side sends eight bytes — a magic number and a length, both big-endian — and an `Any` with a `Struct`, before
//! anything else. Both send at once, so waiting for the other's cannot block either.

use std::{io, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost_types::{Any, Struct, Value as ProtoValue, value::Kind};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{
    filter::{from_struct, to_struct, workload},
    io::Stream,
    plan::bootstrap::Node,
};

/// What we say: made once for the process.
pub(crate) fn own(node: &Node) -> Bytes {
    let value = |kind| ProtoValue { kind: Some(kind) };
    let fields = [
        (
            METADATA.to_owned(),
            value(Kind::StructValue(to_struct(&workload(&node.metadata)))),
        ),
        (ID.to_owned(), value(Kind::StringValue(node.id.to_string()))),
    ];
    let said = Struct {
        fields: fields.into_iter().collect(),
    };
    let any = Any {
        type_url: "type.googleapis.com/google.protobuf.Struct".to_owned(),
        value: said.encode_to_vec(),
    }
    .encode_to_vec();
    let mut out = BytesMut::with_capacity(8 + any.len());
    out.put_u32(MAGIC);
    out.put_u32(any.len() as u32);
    out.put_slice(&any);
    out.freeze()
}

/// Tells the peer who we are and reads who it is; `None` where it does not say so. What it sent instead is put back.
pub(crate) async fn exchange(stream: &mut Stream, own: &[u8]) -> io::Result<Option<Value>> {
    stream.write_all(own).await?;
    stream.flush().await?;
    let mut read = BytesMut::new();
    // A peer that chose the protocol and does not speak it is served all the same.
    let peer = timeout(LIMIT, peer(stream, &mut read)).await.ok().flatten();
    if !read.is_empty() {
        stream.put_back(read.freeze());
    }
    Ok(peer)
}

/// Takes the peer's words off `read`; leaves there whatever is not part of them.
async fn peer(stream: &mut Stream, read: &mut BytesMut) -> Option<Value> {
    let mut wanted = 8;
    loop {
        while read.len() < wanted {
            match stream.read_buf(read).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
            let magic = MAGIC.to_be_bytes();
            let seen = read.len().min(magic.len());
            if read[..seen] != magic[..seen] {
                return None;
            }
        }
        let length = u32::from_be_bytes([read[4], read[5], read[6], read[7]]) as usize;
        if length > MAX_LENGTH {
            return None;
        }
        if read.len() >= 8 + length {
            let said = read.split_to(8 + length);
            return decode(&said[8..]);
        }
        wanted = 8 + length;
    }
}

fn decode(bytes: &[u8]) -> Option<Value> {
    let any = Any::decode(bytes).ok()?;
    let mut said = Struct::decode(&*any.value).ok()?;
    match said.fields.remove(METADATA)?.kind? {
        Kind::StructValue(peer) => Some(workload(&from_struct(peer))),
        _ => None,
    }
}

const MAGIC: u32 = 0x3D23_0467;
const METADATA: &str = "x-envoy-peer-metadata";
const ID: &str = "x-envoy-peer-metadata-id";
/// Labels of a workload, with room to spare.
const MAX_LENGTH: usize = 64 * 1024;
/// How long the peer's words are waited for.
const LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str) -> Bytes {
        own(&Node {
            id: "sidecar~x".into(),
            metadata: json!({"NAME": name, "NAMESPACE": "ns", "LABELS": {"app": name}}),
            ..Node::default()
        })
    }

    #[tokio::test]
    async fn both_learn_who_the_other_is_and_lose_no_byte() {
        let (near, far) = tokio::io::duplex(4096);
        let (mut near, mut far) = (Stream::from(near), Stream::from(far));
        let (a, b) = (node("a"), node("b"));
        let one = async {
            let peer = exchange(&mut near, &a).await.expect("it is open");
            near.write_all(b"hello").await.expect("it is open");
            peer
        };
        let other = async {
            let peer = exchange(&mut far, &b).await.expect("it is open");
            let mut text = [0; 5];
            far.read_exact(&mut text).await.expect("it was sent");
            (peer, text)
        };
        let (of_one, (of_other, text)) = tokio::join!(one, other);
        assert_eq!(of_one.expect("b said so")["NAME"], "b");
        assert_eq!(of_other.expect("a said so")["LABELS"]["app"], "a");
        assert_eq!(&text, b"hello");
    }

    #[tokio::test]
    async fn a_peer_that_says_something_else_is_heard() {
        for said in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\x3d\x23\x04\x67\xff\xff\xff\xff",
            b"=#",
        ] {
            let (near, mut far) = tokio::io::duplex(4096);
            let mut near = Stream::from(near);
            far.write_all(said).await.expect("there is room");
            far.shutdown().await.expect("it is open");
            let peer = exchange(&mut near, b"me").await.expect("it is open");
            assert!(peer.is_none());
            let mut all = Vec::new();
            near.read_to_end(&mut all).await.expect("it ends");
            assert_eq!(all, said);
        }
    }
}
