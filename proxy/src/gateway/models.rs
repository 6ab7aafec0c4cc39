//! What `/v1/models` says: every name that can be asked for.
//!
//! A name that is not a deployment's own says what is behind it: `root` names the deployment that an alias, a split or an
//! adapter leads to (of several, the one with the greatest weight), `parent` the model that an adapter extends.

use bytes::Bytes;
use serde_json::{Value, json};

use super::Gateway;
use crate::{endpoints::Route, error::GatewayError};

impl Gateway {
    pub(super) fn models(&self) -> Bytes {
        let snapshot = self.table.load();
        let data: Vec<_> = snapshot.routes.values().map(|route| model_card(route)).collect();
        json!({"object": "list", "data": data}).to_string().into()
    }

    pub(super) fn model(&self, id: &str) -> Result<Bytes, GatewayError> {
        let snapshot = self.snapshot()?;
        let route =
            snapshot.routes.get(id).ok_or_else(|| GatewayError::UnknownModel { model: id.to_owned() })?;
        Ok(model_card(route).to_string().into())
    }
}

fn model_card(route: &Route) -> Value {
    let mut card = json!({
        "id": &*route.model,
        "object": "model",
        "created": route.created_unix_s,
        "owned_by": "penstock",
    });
    // Of equals the first.
    let greatest = route.targets.iter().rev().max_by_key(|target| target.weight);
    if let Some(target) = greatest.filter(|target| *target.pool != *route.model) {
        card["root"] = (*target.pool).into();
    }
    if !route.parent.is_empty() {
        card["parent"] = route.parent.as_str().into();
    }
    card
}
