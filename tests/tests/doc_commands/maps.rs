//! The commands in docs/maps.md print what the document shows, and its pins exist.

use std::{fs, process::Command};

use imds_tests::{WHOLE_TEST, lacks_program, skip_without_netns_cookie, skip_without_tcx};

use crate::{
    commands::{Content, Documented, content},
    documented_node::{CONFIG_FILE, DocumentedNode, PIN_DIR, bash},
    lacks_repository,
    markdown::{Block, Document},
};

/// Returns the different lines in an order that does not depend on hashes, with `#` for each word that contains a digit: indices,
/// numbers and names of interfaces differ between nodes.
fn without_numbers<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let without = |line: &str| {
        let mut words = String::new();
        for word in line.split_inclusive(|char: char| !char.is_alphanumeric() && char != '_') {
            let end = word.trim_start_matches(|char: char| char.is_alphanumeric() || char == '_');
            let is_number = word.contains(|char: char| char.is_ascii_digit());
            words.push_str(if is_number { "#" } else { &word[..word.len() - end.len()] });
            words.push_str(end);
        }
        words
    };
    let mut lines: Vec<_> = lines.into_iter().map(without).collect();
    lines.sort();
    lines.dedup();
    lines
}

/// Returns a line without `node_egress` at the interface of a pod, which the agent attaches if it sees the interface before
/// the pod, and then keeps.
fn without_precaution(line: &str) -> String {
    line.replace(
        "\"role\":\"pod\",\"attach_modes\":[\"tcx\",\"tcx\"]",
        "\"role\":\"pod\",\"attach_modes\":[\"tcx\",\"none\"]",
    )
}

/// Returns the names below the pin directory at the start of the lines of the first block.
fn pins(block: &Block) -> impl Iterator<Item = &str> {
    block.lines.iter().filter_map(|line| line.strip_prefix(PIN_DIR)?.split(' ').next())
}

#[test]
fn documented_commands_print_names() {
    if lacks_repository()
        || lacks_program(WHOLE_TEST, &["bpftool", "jq", "bash"])
        || skip_without_tcx()
        || skip_without_netns_cookie()
    {
        return;
    }
    let document = Document::read("docs/maps.md".as_ref());
    let node = DocumentedNode::new();
    let _agent = node.agent().spawn_ready();
    node.send_requests();
    let (env, maps) = (&node.env, node.maps());
    let optional = ["/maps/imds_requests", "/progs/imds_host_", "/progs/imds_node_", "/links/"];
    for pin in pins(&document.blocks[0]).filter(|pin| !optional.iter().any(|start| pin.starts_with(start))) {
        assert!(fs::exists(env.pin_dir().join(&pin[1..])).unwrap(), "{pin} does not exist");
    }
    let mut examples = Vec::new();
    for block in &document.blocks {
        if let Content::Commands(commands) = content(block).unwrap() {
            examples.extend(commands);
        }
    }
    assert!(examples.len() > 15, "{examples:?}");
    let mut different = Vec::new();
    for Documented { text, output, .. } in &examples {
        let command = text.replace(PIN_DIR, env.pin_dir().to_str().unwrap());
        let printed = bash(Command::new("bash"), &command, &maps);
        assert!(printed.status.success(), "{command}: {printed:?}");
        let printed = String::from_utf8(printed.stdout).unwrap();
        let printed = printed.replace(node.config.to_str().unwrap(), CONFIG_FILE);
        eprintln!("# {command}\n{printed}");
        if !output.is_empty() && command.contains("map dump") {
            let documented = output.iter().map(String::as_str);
            let printed: Vec<_> = printed.lines().map(without_precaution).collect();
            if without_numbers(printed.iter().map(String::as_str)) != without_numbers(documented) {
                different.push(command);
            }
        }
    }
    assert!(different.is_empty(), "docs/maps.md shows other output: {different:#?}");
    // The last command of the document changes the mode.
    assert_eq!(env.status().mode.as_deref(), Some("audit"));
}
