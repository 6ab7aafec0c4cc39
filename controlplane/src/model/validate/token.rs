//! The body that makes a token.

use penstock_config::controlplane::Role;
use serde_json::Value;

use super::{FieldError, object, string, whole_in};

/// Ten years, in seconds.
const MAX_LIFE_S: u64 = 315_360_000;

/// A checked body of POST /api/v2/tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBody {
    /// What it is called.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// After how long it is not accepted any more; None: it always is.
    pub expires_in_s: Option<u32>,
}

/// Checks the body.
pub fn token_body(body: &Value) -> Result<TokenBody, FieldError> {
    let fields = object(body, &["name", "role", "expires_in_s"])?;
    let given = |field: &str| {
        let value = fields.get(field).ok_or_else(|| FieldError::new(field, format!("{field} is missing")))?;
        string(field, value)
    };
    let (name, role) = (given("name")?, given("role")?);
    token_name(name)?;
    let named = Role::named(role).ok_or_else(|| {
        let all = Role::ALL.map(Role::as_str).join(", ");
        FieldError::new("role", format!("role must be one of {all}; it is {role:?}"))
    })?;
    let expires_in_s = match fields.get("expires_in_s") {
        None | Some(Value::Null) => None,
        Some(_) => whole_in(fields, "expires_in_s", 1, MAX_LIFE_S)?,
    };
    Ok(TokenBody { name: name.to_owned(), role: named, expires_in_s })
}

/// Checks a token's name.
pub fn token_name(name: &str) -> Result<(), FieldError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let taken = name.starts_with("settings-") || name == crate::access::ANYBODY;
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) || taken {
        let shown: String = name.chars().take(64).collect();
        let wanted = "a token's name has 1 to 64 characters out of A-Z a-z 0-9 . _ -, and neither is \"anybody\" nor begins \
                      with \"settings-\"";
        return Err(FieldError::new("name", format!("{wanted}; this one is {shown:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_refusal_names_its_field() {
        let body = token_body(&json!({"name": "ci", "role": "operator", "expires_in_s": 60})).expect("valid");
        assert_eq!((body.role, body.expires_in_s), (Role::Operator, Some(60)));
        for (body, field) in [
            (json!([]), ""),
            (json!({"name": "ci"}), "role"),
            (json!({"role": "admin"}), "name"),
            (json!({"name": "ci", "role": "boss"}), "role"),
            (json!({"name": "c i", "role": "admin"}), "name"),
            (json!({"name": "settings-1", "role": "admin"}), "name"),
            (json!({"name": "ci", "role": "admin", "expires_in_s": 0}), "expires_in_s"),
            (json!({"name": "ci", "role": "admin", "expires": 1}), "expires"),
        ] {
            assert_eq!(token_body(&body).expect_err(&body.to_string()).field, field);
        }
    }
}
