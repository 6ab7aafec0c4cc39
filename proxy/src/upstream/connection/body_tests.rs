use proptest::prelude::*;

use super::*;

/// The payload of `pieces`, fed one after the other; whether it ended, and what was left over.
fn decoded(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool, Vec<u8>), BadBody> {
    let (mut decoder, mut buffer, mut payload) = (Decoder::new(framing), BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            let some = decoder.decode(&mut buffer)?;
            if some.is_empty() {
                break;
            }
            payload.extend_from_slice(&some);
        }
    }
    Ok((payload, decoder.is_ended(), buffer.to_vec()))
}

fn whole(framing: Framing, bytes: &[u8]) -> Result<(Vec<u8>, bool, Vec<u8>), BadBody> {
    decoded(framing, &[bytes])
}

#[test]
fn a_length_is_counted_and_what_follows_is_left() {
    assert_eq!(whole(Framing::Length(3), b"abcd"), Ok((b"abc".to_vec(), true, b"d".to_vec())));
    assert_eq!(whole(Framing::Length(3), b"ab"), Ok((b"ab".to_vec(), false, Vec::new())));
    assert_eq!(whole(Framing::Length(0), b"x"), Ok((Vec::new(), true, b"x".to_vec())));
    assert_eq!(Decoder::new(Framing::Length(3)).close(), Err(BadBody::CutShort));
    assert_eq!(Decoder::new(Framing::Length(3)).left(), Some(3));
}

#[test]
fn the_end_of_the_connection_ends_only_a_body_without_framing() {
    let mut decoder = Decoder::new(Framing::UntilClose);
    assert_eq!(decoder.decode(&mut BytesMut::from("abc")).as_deref(), Ok(&b"abc"[..]));
    assert!(!decoder.is_ended());
    assert_eq!(decoder.close(), Ok(()));
    assert!(decoder.is_ended() && !decoder.leaves_connection());
    assert_eq!(Decoder::new(Framing::Chunked).close(), Err(BadBody::CutShort));
}

#[test]
fn chunks_come_without_their_framing() {
    for (wire, payload, rest) in [
        (&b"3\r\nabc\r\n0\r\n\r\n"[..], &b"abc"[..], &b""[..]),
        (b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nHTTP", b"abcde", b"HTTP"),
        (b"0\r\n\r\n", b"", b""),
        (b"003;a=b\r\nabc\r\n00 ;x\r\nT: 1\r\nU: 2\r\n\r\n", b"abc", b""),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b""),
    ] {
        assert_eq!(
            whole(Framing::Chunked, wire),
            Ok((payload.to_vec(), true, rest.to_vec())),
            "{}",
            wire.escape_ascii()
        );
    }
}

#[test]
fn what_breaks_a_rule_is_refused_behind_the_payload_before_it() {
    let long = [b"5;".as_slice(), &[b'x'; MOST_SIZE_LINE]].concat();
    let trailers = [b"0\r\n".as_slice(), &b"a: b\r\n".repeat(MOST_TRAILERS / 6 + 1)].concat();
    for (wire, bad) in [
        (&b"\r\nabc"[..], BadBody::Size),
        (b"g\r\n", BadBody::Size),
        (b"-1\r\n", BadBody::Size),
        (b"+1\r\n", BadBody::Size),
        (b"0x1\r\n", BadBody::Size),
        (b" 1\r\n", BadBody::Size),
        (b"1 2\r\n", BadBody::Size),
        (b"1\n", BadBody::LineEnd),
        (b"1;a\rb\r\n", BadBody::LineEnd),
        (b"1\r\nab\r\n", BadBody::LineEnd),
        (b"1\r\na\n", BadBody::LineEnd),
        (b"0\r\nx: 1\n\r\n", BadBody::LineEnd),
        (b"11111111111111111\r\n", BadBody::TooLarge),
        (&long, BadBody::LongLine),
        (&trailers, BadBody::LongTrailers),
    ] {
        assert_eq!(whole(Framing::Chunked, wire), Err(bad), "{}", wire.escape_ascii());
        let (mut decoder, mut buffer) = (Decoder::new(Framing::Chunked), BytesMut::from("2\r\nok\r\n"));
        buffer.extend_from_slice(wire);
        assert_eq!(decoder.decode(&mut buffer).map(|some| some.starts_with(b"ok")), Ok(true));
        assert_eq!(decoder.decode(&mut buffer), Err(bad));
        assert_eq!(decoder.decode(&mut buffer), Err(bad), "once bad, always bad");
    }
    assert_eq!(chunk_size(b"ffffffffffffffff"), Ok(u64::MAX));
}

/// The payload of well-formed chunks, read as the standard writes it down.
fn naive(mut wire: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    loop {
        let end = wire.windows(2).position(|pair| pair == b"\r\n").expect("a line");
        let text = std::str::from_utf8(&wire[..end]).expect("a size");
        let size = text.split(';').next().and_then(|size| usize::from_str_radix(size, 16).ok()).expect("hex");
        if size == 0 {
            return payload;
        }
        payload.extend_from_slice(&wire[end + 2..end + 2 + size]);
        wire = &wire[end + 4 + size..];
    }
}

fn wire() -> impl Strategy<Value = Vec<u8>> {
    let chunk = (proptest::collection::vec(any::<u8>(), 1..40), prop::bool::ANY);
    let trailer = proptest::collection::vec("[a-z]{1,8}: [ -~]{0,8}\r\n", 0..3);
    (proptest::collection::vec(chunk, 0..8), trailer).prop_map(|(chunks, trailers)| {
        let mut wire = Vec::new();
        for (data, extended) in chunks {
            let extension = if extended { ";a=b" } else { "" };
            wire.extend_from_slice(format!("{:x}{extension}\r\n", data.len()).as_bytes());
            wire.extend_from_slice(&data);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(format!("0\r\n{}\r\n", trailers.concat()).as_bytes());
        wire
    })
}

proptest! {
    #[test]
    fn cuts_change_nothing(wire in wire(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len() + 1)).collect();
        cuts.extend([0, wire.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &wire[pair[0]..pair[1]]).collect();
        let (payload, ended, rest) = decoded(Framing::Chunked, &pieces).expect("well-formed");
        prop_assert!(ended && rest.is_empty());
        prop_assert_eq!(payload, naive(&wire));
    }

    #[test]
    fn any_bytes_are_read_alike_however_they_come(
        bytes in proptest::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b'2'), Just(b';'), any::<u8>()], 0..60),
        cut in any::<prop::sample::Index>(),
    ) {
        let (front, back) = bytes.split_at(cut.index(bytes.len() + 1));
        prop_assert_eq!(decoded(Framing::Chunked, &[front, back]), whole(Framing::Chunked, &bytes));
    }
}
