//! Responses of a listener without rules, which explains to a denied pod why it gets no metadata.

use imds_broker::{allow::Rule, provider::Provider};
use serde_json::json;

use crate::response;

/// Longest path that the explanation repeats.
const MAX_SHOWN_PATH: usize = 256;

/// Returns one line that tells who denies a request, and the exemption that would allow it.
pub(crate) fn reason(method: &str, path: &str) -> String {
    // A malformed request gets a hint too if its path is canonical.
    let rule = (path.len() <= MAX_SHOWN_PATH).then(|| Rule::parse(&format!("{method} {path}")));
    let allow = match rule {
        Some(Ok(rule)) => format!(" with allow = [\"{rule}\"]"),
        Some(Err(_)) | None => String::new(),
    };
    format!(
        "imds-agent of this node denies this pod the metadata service; ask the operator for an [[exempt]] rule for this pod{allow}"
    )
}

/// Returns the response to a request for `path`, in the form in which the metadata service answers with the status 403.
pub(crate) fn response(provider: &Provider, path: &str, reason: &str, is_head: bool) -> Vec<u8> {
    let (headers, body) = form(provider, path, reason);
    response::forbidden(&headers, &body, is_head)
}

/// Headers and body of a response.
type Form = (Vec<(&'static str, &'static str)>, String);

fn form(provider: &Provider, path: &str, reason: &str) -> Form {
    match provider.name {
        // Errors of identities have an OAuth code and a description:
        // https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token#error-handling
        "azure" if path.starts_with("/metadata/identity") => {
            json_form(&json!({ "error": "access_denied", "error_description": reason }))
        }
        // https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service#errors-and-debugging
        "azure" => json_form(&json!({ "error": reason })),
        // The mock of AWS has the errors 400, 401 and 404 of the service (pkg/server/httpserver.go of
        // aws/amazon-ec2-metadata-mock). 403 means that a request is not allowed, or that the service is off:
        // https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
        "aws" => (vec![("content-type", "text/html")], xhtml(reason)),
        // Headers and form of a recorded response: https://github.com/salrashid123/gce_metadata_server/pull/11. Clients recognize the
        // service by the first header: https://cloud.google.com/compute/docs/metadata/querying-metadata
        "gcp" => {
            let headers = vec![("metadata-flavor", "Google"), ("content-type", "text/html; charset=UTF-8")];
            let text = escape(reason);
            let title = "Error 403 (Forbidden)";
            let body = format!(
                "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n<title>{title}</title>\n<p><b>403.</b> {text}\n"
            );
            (headers, body)
        }
        // No documentation of these services shows the body of an error.
        _ => (vec![("content-type", "text/plain; charset=utf-8")], format!("{reason}\n")),
    }
}

fn json_form(body: &serde_json::Value) -> Form {
    (vec![("content-type", "application/json; charset=utf-8")], body.to_string())
}

fn xhtml(reason: &str) -> String {
    const TITLE: &str = "403 - Forbidden";
    let text = escape(reason);
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\" \
         \"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n <head>\n  <title>{TITLE}</title>\n </head>\n \
         <body>\n  <h1>{TITLE}</h1>\n  <p>{text}</p>\n </body>\n</html>\n"
    )
}

/// A canonical path can contain `&`.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "/metadata/identity/oauth2/token";

    #[test]
    fn reason_is_one_line_with_a_rule() {
        assert_eq!(
            reason("GET", "/latest/meta-data/placement/region/"),
            "imds-agent of this node denies this pod the metadata service; ask the operator for an [[exempt]] rule for this pod with \
             allow = [\"GET /latest/meta-data/placement/region\"]"
        );
        let long = format!("/{}", "a".repeat(MAX_SHOWN_PATH));
        for (method, path) in
            [("GET", "/"), ("GET", "/a/../b"), ("GET", "<script>"), ("PATCH", "/a"), ("", ""), ("GET", &long)]
        {
            let reason = reason(method, path);
            assert!(reason.ends_with(" for this pod") && !reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn forms_of_providers() {
        let text = |provider, path| {
            let reason = reason("GET", path);
            let response = response(Provider::named(provider), path, &reason, false);
            (String::from_utf8(response).unwrap(), reason)
        };
        for (provider, path, form) in [
            ("azure", TOKEN, "{\"error\":\"access_denied\",\"error_description\":\"imds-agent"),
            ("azure", "/metadata/instance", "{\"error\":\"imds-agent"),
            ("aws", "/latest/meta-data", "<h1>403 - Forbidden</h1>\n  <p>imds-agent"),
            ("gcp", "/computeMetadata/v1", "<p><b>403.</b> imds-agent"),
            ("hetzner", "/hetzner/v1", "\r\n\r\nimds-agent"),
        ] {
            let (response, reason) = text(provider, path);
            assert!(response.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{response}");
            assert!(response.contains("\r\nconnection: close\r\n") && response.contains(form), "{response}");
            assert_eq!(response.contains("metadata-flavor: Google\r\n"), provider == "gcp");
            let plain = if provider == "azure" { reason.replace('"', "\\\"") } else { reason };
            assert!(response.contains(&plain), "{response}");
        }
        let escaped = response(Provider::named("aws"), "/", "a & <b>", false);
        let escaped = String::from_utf8(escaped).unwrap();
        assert!(escaped.contains("a &amp; &lt;b&gt;"), "{escaped}");
    }

    #[test]
    fn head_gets_no_body() {
        let provider = Provider::named("azure");
        let [with, without] =
            [false, true].map(|is_head| response(provider, "/", "no", is_head)).map(|bytes| bytes.len());
        assert_eq!(with - without, "{\"error\":\"no\"}".len());
    }
}
