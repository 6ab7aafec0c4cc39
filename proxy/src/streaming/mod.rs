//! An answer on its way to the client: events (read by [`leg`], written by [`relay`]), or a WebSocket's bytes both ways ([`tunnel`], [`websocket`],
//! [`rename`]).

pub mod bell;
pub mod leg;
pub mod relay;
pub mod rename;
pub mod tunnel;
pub mod websocket;
