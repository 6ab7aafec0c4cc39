//! The PROXY protocol, version 2: who the client of the balancer in front of us is.
//!
//! A header of 16 bytes says how long the rest is; the rest holds addresses and further fields, of which we take the source
//! address. `LOCAL` connections (the balancer's own health checks) and families without an IP address keep the socket's.
//! The text version 1 is not spoken: every balancer that sends it can send version 2.
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// What every header begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Bytes before the part whose length they tell.
const FIXED_BYTES: usize = 16;

/// More than this after the fixed part is no header: addresses take 36 bytes, and balancers add some hundred.
const MOST_BYTES: usize = 4_096;

/// Why a connection does not begin with a header.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It begins with something else.
    #[error("no PROXY protocol signature")]
    Signature,
    /// It is of another version, or a command that is not known.
    #[error("PROXY protocol version and command {0:#04x}; only version 2 is spoken, LOCAL and PROXY")]
    VersionOrCommand(u8),
    /// Its family is not known.
    #[error("PROXY protocol family {0:#04x} is not known")]
    Family(u8),
    /// It is longer than any balancer's.
    #[error("a PROXY protocol header of {0} bytes; at most {MOST_BYTES} are accepted")]
    Length(usize),
    /// It is too short for the addresses that it announces.
    #[error("the PROXY protocol header ends inside its addresses")]
    Short,
    /// The connection ended inside it.
    #[error("the connection ended inside the PROXY protocol header")]
    Ended,
}

/// Reads a header off `stream`, and not a byte more. `None`: it names no client.
///
/// # Errors
/// What came is not a header. The stream is then good for nothing.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, HeaderError> {
    let mut fixed = [0; FIXED_BYTES];
    stream.read_exact(&mut fixed).await.map_err(|_| HeaderError::Ended)?;
    let fixed = Fixed::parse(&fixed)?;
    let mut rest = vec![0; fixed.length];
    stream.read_exact(&mut rest).await.map_err(|_| HeaderError::Ended)?;
    fixed.source(&rest)
}

#[derive(Debug, PartialEq, Eq)]
enum Family {
    /// `LOCAL`, or without an IP address.
    None,
    V4,
    V6,
}

/// The part of a header whose length is known.
#[derive(Debug, PartialEq, Eq)]
struct Fixed {
    family: Family,
    length: usize,
}

impl Fixed {
    fn parse(bytes: &[u8; FIXED_BYTES]) -> Result<Self, HeaderError> {
        let [signature @ .., version_and_command, family, high, low] = bytes;
        if *signature != SIGNATURE {
            return Err(HeaderError::Signature);
        }
        // The low half of the family is the transport: a stream, a datagram, or unknown. Only streams come here.
        let family = match (version_and_command, family >> 4, family & 0xf) {
            (0x20, ..) | (0x21, 0 | 3, 0..=2) => Family::None,
            (0x21, 1, 0..=2) => Family::V4,
            (0x21, 2, 0..=2) => Family::V6,
            (0x21, ..) => return Err(HeaderError::Family(*family)),
            _ => return Err(HeaderError::VersionOrCommand(*version_and_command)),
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length > MOST_BYTES {
            return Err(HeaderError::Length(length));
        }
        Ok(Self { family, length })
    }

    /// The client's address out of what follows: source and destination address, source and destination port.
    fn source(&self, rest: &[u8]) -> Result<Option<SocketAddr>, HeaderError> {
        let (ip, port): (IpAddr, _) = match self.family {
            Family::None => return Ok(None),
            Family::V4 => match rest {
                [a, b, c, d, _, _, _, _, high, low, _, _, ..] => {
                    (Ipv4Addr::new(*a, *b, *c, *d).into(), [*high, *low])
                }
                _ => return Err(HeaderError::Short),
            },
            Family::V6 => {
                let source = rest.first_chunk::<16>().ok_or(HeaderError::Short)?;
                let ports = rest.get(32..36).ok_or(HeaderError::Short)?;
                (Ipv6Addr::from(*source).to_canonical(), [ports[0], ports[1]])
            }
        };
        Ok(Some(SocketAddr::new(ip, u16::from_be_bytes(port))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as a balancer writes it.
    fn header(source: SocketAddr, extra: &[u8]) -> Vec<u8> {
        let (family, mut rest) = match source.ip() {
            IpAddr::V4(ip) => (0x11, [ip.octets(), [9, 9, 9, 9]].concat()),
            IpAddr::V6(ip) => (0x21, [ip.octets(), [9; 16]].concat()),
        };
        rest.extend(source.port().to_be_bytes());
        rest.extend([0, 80]);
        rest.extend(extra);
        assemble(0x21, family, &rest)
    }

    fn assemble(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    fn read_all(bytes: &[u8]) -> (Result<Option<SocketAddr>, HeaderError>, usize) {
        let mut stream = bytes;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let result = runtime.block_on(read(&mut stream));
        (result, stream.len())
    }

    proptest! {
        #[test]
        fn the_source_comes_back_and_nothing_after_the_header_is_read(
            ip: IpAddr, port: u16, extra in proptest::collection::vec(any::<u8>(), 0..64), after: Vec<u8>,
        ) {
            let source = SocketAddr::new(ip.to_canonical(), port);
            let (result, left) = read_all(&[header(source, &extra), after.clone()].concat());
            prop_assert_eq!(result, Ok(Some(source)));
            prop_assert_eq!(left, after.len());
        }

        #[test]
        fn a_header_cut_anywhere_is_refused(port: u16, v6: bool, cut in 0usize..60) {
            let ip: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            let whole = header(SocketAddr::new(ip, port), &[]);
            prop_assume!(cut < whole.len());
            prop_assert_eq!(read_all(&whole[..cut]).0, Err(HeaderError::Ended));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, signed: bool) {
            let start: &[u8] = if signed { &SIGNATURE } else { &[] };
            drop(read_all(&[start, &bytes[..]].concat()));
        }
    }

    #[test]
    fn health_checks_and_unix_sockets_keep_the_sockets_address() {
        assert_eq!(read_all(&assemble(0x20, 0x00, &[])).0, Ok(None));
        assert_eq!(read_all(&assemble(0x20, 0x11, &[1; 12])).0, Ok(None));
        assert_eq!(read_all(&assemble(0x21, 0x00, &[])).0, Ok(None));
        assert_eq!(read_all(&assemble(0x21, 0x31, &[0; 216])).0, Ok(None));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let cases = [
            (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), HeaderError::Signature),
            (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n".to_vec(), HeaderError::Signature),
            (assemble(0x11, 0x11, &[0; 12]), HeaderError::VersionOrCommand(0x11)),
            (assemble(0x22, 0x11, &[0; 12]), HeaderError::VersionOrCommand(0x22)),
            (assemble(0x21, 0x41, &[0; 12]), HeaderError::Family(0x41)),
            (assemble(0x21, 0x13, &[0; 12]), HeaderError::Family(0x13)),
            (assemble(0x21, 0x11, &[0; 11]), HeaderError::Short),
            (assemble(0x21, 0x21, &[0; 35]), HeaderError::Short),
            (assemble(0x21, 0x11, &[0; 5_000]), HeaderError::Length(5_000)),
        ];
        for (bytes, error) in cases {
            assert_eq!(read_all(&bytes).0, Err(error));
        }
    }
}
