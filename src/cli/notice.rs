//! `jwksd notice`: trying the receivers of notices, by the configuration alone.

use super::client::configuration;
use super::{Failure, Global, Outcome, Output};
use crate::engine::notices::NotDelivered;
use crate::keyring::notice::Notice;

/// Sends a signed test notice to one receiver, or to all.
pub(super) async fn test(global: &Global, name: Option<&str>) -> Outcome {
    let config = configuration(global)?;
    let usage = |error: &dyn std::error::Error| Failure::Usage(crate::engine::chain(error));
    let mut webhooks = crate::app::webhooks(&config).map_err(|error| usage(&error))?;
    if let Some(name) = name {
        webhooks.retain(|(known, _)| known.as_str() == name);
    }
    if webhooks.is_empty() {
        return Err(Failure::Usage(match name {
            Some(name) => format!("the configuration has no [notice.{name}]"),
            None => "the configuration has no [notice.NAME]: docs/notices.md shows one".to_owned(),
        }));
    }
    let mut failed = 0;
    for (name, webhook) in &webhooks {
        let now = crate::app::system_now();
        let notice = Notice::test(format!("jwksd_test_{}", &crate::app::fresh_token()[..22]), now);
        let sent = webhook.send(&notice, now).await;
        failed += usize::from(sent.is_err());
        tell(global.output, name.as_str(), &notice.id, sent);
    }
    match failed {
        0 => Ok(()),
        failed => {
            Err(Failure::Failed(format!("{failed} of {} receivers did not take the test notice", webhooks.len())))
        }
    }
}

fn tell(output: Output, name: &str, id: &str, sent: Result<u16, NotDelivered>) {
    match output {
        Output::Text => match sent {
            Ok(status) => println!("{name}: delivered, it answers {status} ({id})"),
            Err(error) => println!("{name}: not delivered: {error} ({id})"),
        },
        Output::Json => {
            let (status, error) = match sent {
                Ok(status) => (Some(status), None),
                Err(error) => (None, Some(error.to_string())),
            };
            println!("{}", serde_json::json!({ "notice": name, "id": id, "status": status, "error": error }));
        }
    }
}
