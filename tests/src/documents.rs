//! Answers of the metadata service: the tokens and credentials that clients of Azure, AWS and GCP ask for.

/// Instance document, in the form of Azure's.
const INSTANCE: &str = r#"{"compute":{"azEnvironment":"AzurePublicCloud","location":"westeurope","name":"node-0","osType":"Linux","vmId":"02aab8a4-74ef-476e-8182-f6d2ba4166a6"}}"#;
const AZURE_TOKEN: &str = r#"{"access_token":"token","client_id":"02aab8a4-74ef-476e-8182-f6d2ba4166a6","expires_in":"86400","expires_on":"4102444800","resource":"https://management.azure.com/","token_type":"Bearer"}"#;
const AZURE_WITHOUT_HEADER: &str =
    r#"{"error":"invalid_request","error_description":"Required metadata header not specified"}"#;
const AWS_CREDENTIALS: &str = r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"ASIA0000000000000000","SecretAccessKey":"secret","Token":"token","LastUpdated":"2026-01-01T00:00:00Z","Expiration":"2100-01-01T00:00:00Z"}"#;
const GCP_ACCOUNT: &str = r#"{"aliases":["default"],"email":"node@project.iam.gserviceaccount.com","scopes":["https://www.googleapis.com/auth/cloud-platform"]}"#;
const GCP_TOKEN: &str = r#"{"access_token":"token","expires_in":3599,"token_type":"Bearer"}"#;

/// Returns the whole HTTP response to a request. A path that no cloud's client asks for gets the instance document.
pub(crate) fn respond(request: &[u8]) -> String {
    let request = String::from_utf8_lossy(request);
    let mut words = request.split_ascii_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let (status, body) = match (method, path) {
        ("PUT", "/latest/api/token") => ("200 OK", "token"),
        ("GET", "/latest/meta-data/iam/security-credentials/") => ("200 OK", "role"),
        ("GET", "/latest/meta-data/iam/security-credentials/role") => ("200 OK", AWS_CREDENTIALS),
        ("GET", "/metadata/identity/oauth2/token") if has_metadata_header(&request) => {
            ("200 OK", AZURE_TOKEN)
        }
        // Azure's clients probe the service without the header.
        ("GET", "/metadata/identity/oauth2/token") => ("400 Bad Request", AZURE_WITHOUT_HEADER),
        ("GET", path) if path.starts_with("/computeMetadata/v1/") && path.ends_with("/token") => {
            ("200 OK", GCP_TOKEN)
        }
        ("GET", "/computeMetadata/v1/instance/service-accounts/default/") => ("200 OK", GCP_ACCOUNT),
        ("GET", "/computeMetadata/v1/project/project-id") => ("200 OK", "project"),
        ("GET", _) => ("200 OK", INSTANCE),
        _ => ("405 Method Not Allowed", INSTANCE),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nMetadata-Flavor: Google\r\n\
         X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 21600\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn has_metadata_header(request: &str) -> bool {
    request.lines().any(|line| line.eq_ignore_ascii_case("metadata: true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn azure_tokens_take_the_metadata_header() {
        let request = "GET /metadata/identity/oauth2/token?resource=x HTTP/1.1\r\nHost: x\r\n";
        assert!(respond(format!("{request}\r\n").as_bytes()).starts_with("HTTP/1.1 400 "));
        let with_header = respond(format!("{request}metadata: true\r\n\r\n").as_bytes());
        assert!(with_header.starts_with("HTTP/1.1 200 ") && with_header.ends_with(AZURE_TOKEN));
    }

    #[test]
    fn other_requests_get_the_instance_document() {
        let response = respond(b"GET / HTTP/1.0\r\n\r\n");
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n") && response.ends_with(INSTANCE));
        assert!(respond(b"POST /latest/api/token HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert!(respond(b"").starts_with("HTTP/1.1 405 "));
    }
}
