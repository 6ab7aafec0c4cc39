//! What `/v1/models` says.

use bytes::Bytes;
use serde_json::json;

use super::Gateway;
use crate::error::GatewayError;

impl Gateway {
    pub(super) fn models(&self) -> Bytes {
        let snapshot = self.table.load();
        let data: Vec<_> =
            snapshot.routes.values().map(|route| model_card(&route.model, route.created_unix_s)).collect();
        json!({"object": "list", "data": data}).to_string().into()
    }

    pub(super) fn model(&self, id: &str) -> Result<Bytes, GatewayError> {
        let snapshot = self.snapshot()?;
        let route =
            snapshot.routes.get(id).ok_or_else(|| GatewayError::UnknownModel { model: id.to_owned() })?;
        Ok(model_card(&route.model, route.created_unix_s).to_string().into())
    }
}

fn model_card(id: &str, created: i64) -> serde_json::Value {
    json!({"id": id, "object": "model", "created": created, "owned_by": "penstock"})
}
