//! Commands that change something.

use std::time::Duration;

use serde_json::Value;

use super::{connect, views, wait};
use crate::{
    api::{ApiError, DeploymentSpec, LoraAdapter},
    args::{DeleteArgs, DeployArgs, ScaleArgs},
    output::show,
};

pub(crate) async fn deploy(args: &DeployArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let spec = DeploymentSpec {
        replicas: args.replicas,
        engine: args.engine.clone(),
        model_path: args.model_path.clone(),
        args: args.args.clone(),
        env: args.env.iter().cloned().collect(),
        gpus_per_replica: args.gpus_per_replica,
        lora: args
            .lora
            .iter()
            .map(|(name, path)| LoraAdapter { name: name.clone(), path: path.clone() })
            .collect(),
        fields: args.fields.iter().map(|(name, text)| (name.clone(), value(text))).collect(),
    };
    let mut reply = server.deploy(&args.model, &spec).await?;
    if args.wait.wait {
        reply = wait::as_wanted(&server, &args.model, Duration::from_secs(args.wait.timeout_s)).await?;
    }
    show(args.remote.output, &reply.json, || views::deployment_table(&[reply.value]))?;
    Ok(())
}

/// A number, true or false as such, and anything else as the text it is.
fn value(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(value @ (Value::Number(_) | Value::Bool(_))) => value,
        _ => text.into(),
    }
}

pub(crate) async fn scale(args: &ScaleArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let mut reply = server.scale(&args.model, args.replicas).await?;
    if args.wait.wait {
        reply = wait::as_wanted(&server, &args.model, Duration::from_secs(args.wait.timeout_s)).await?;
    }
    show(args.remote.output, &reply.json, || views::deployment_table(&[reply.value]))?;
    Ok(())
}

pub(crate) async fn delete(args: &DeleteArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let reply = server.delete(&args.model).await?;
    if args.wait.wait {
        wait::gone(&server, &args.model, Duration::from_secs(args.wait.timeout_s)).await?;
    }
    show(args.remote.output, &reply.json, || format!("deleted {}\n", args.model))?;
    Ok(())
}
