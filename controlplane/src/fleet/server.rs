//! The gRPC service of the fleet: each stream becomes a session task.

use std::sync::Arc;

use penstock_proto::{MAX_GRPC_MESSAGE_BYTES, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{relay, session};
use crate::core::Core;

/// Messages to one agent that may wait: it reads them as they come, and a full set replaces the one before.
const OUTBOUND: usize = 64;

/// See the module's text.
#[derive(Clone)]
pub struct FleetService {
    core: Arc<Core>,
}

impl FleetService {
    /// The service as tonic takes it.
    pub fn server(core: Arc<Core>) -> v1::fleet_server::FleetServer<Self> {
        v1::fleet_server::FleetServer::new(Self { core })
            .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl v1::fleet_server::Fleet for FleetService {
    type SessionStream = ReceiverStream<Result<v1::ControllerMessage, Status>>;

    /// Answers at once: an agent may wait for the response's head before it sends its Hello.
    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (outbound, stream) = mpsc::channel(OUTBOUND);
        let core = self.core.clone();
        let relayed = request.metadata().contains_key(relay::RELAYED);
        if core.leadership.elected().is_some() {
            self.core.tasks.spawn(session::run(core, request.into_inner(), outbound));
        } else if relayed {
            return Err(Status::unavailable("this control plane leads no more: connect again"));
        } else {
            self.core.tasks.spawn(relay::run(core, request.into_inner(), outbound));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
