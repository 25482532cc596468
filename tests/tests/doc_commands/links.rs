//! Links between the documents, and the table of contents of the site.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    lacks_repository,
    markdown::{Document, read_directory, repository},
};

/// Removes `.` and `..` from a path without following symlinks.
fn normalize(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path {
        if part == ".." {
            normal.pop();
        } else if part != "." {
            normal.push(part);
        }
    }
    normal
}

fn documents() -> Vec<Document> {
    [(".", false), (".github", true), ("docs", true)]
        .into_iter()
        .flat_map(|(directory, is_deep)| read_directory(directory, is_deep))
        .collect()
}

#[test]
fn links_and_anchors_resolve() {
    if lacks_repository() {
        return;
    }
    let documents = documents();
    let (mut count, mut broken) = (0, Vec::new());
    for document in &documents {
        for link in &document.links {
            if link.text.contains("://") || link.text.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (path, anchor) = link.text.split_once('#').unwrap_or((&link.text, ""));
            let target = match path {
                "" => document.path.clone(),
                _ => normalize(&document.path.parent().unwrap_or(Path::new("")).join(path)),
            };
            let has_anchor = || {
                let target = documents.iter().find(|other| other.path == target);
                target.is_some_and(|target| target.anchors.iter().any(|other| other == anchor))
            };
            if !repository().join(&target).exists() || !anchor.is_empty() && !has_anchor() {
                broken.push(format!("{}: {}", link.at, link.text));
            }
        }
    }
    assert!(count > 150, "{count} links");
    assert!(broken.is_empty(), "{broken:#?}");
}

/// `cargo xtask book` copies only some files, and the site has no page for a directory.
#[test]
fn links_lead_to_files_of_the_site() {
    if lacks_repository() {
        return;
    }
    let source = fs::read_to_string(repository().join("xtask/src/book.rs")).unwrap();
    let list = source.split("const CONTENT").nth(1).and_then(|rest| rest.split(';').nth(1)).unwrap();
    let content: Vec<_> = list.split('"').skip(1).step_by(2).collect();
    assert!(content.contains(&"docs") && content.contains(&"README.md"), "{content:?}");
    let is_copied =
        |path: &Path| path.iter().next().is_some_and(|first| content.iter().any(|name| *name == first));
    let mut outside = Vec::new();
    for page in documents().iter().filter(|page| is_copied(&page.path)) {
        let links =
            page.links.iter().filter(|link| !link.text.contains("://") && !link.text.starts_with('#'));
        for link in links {
            let path = link.text.split('#').next().unwrap_or_default();
            let target = normalize(&page.path.parent().unwrap_or(Path::new("")).join(path));
            if !is_copied(&target) || repository().join(&target).is_dir() {
                outside.push(format!("{}: {}", link.at, link.text));
            }
        }
    }
    assert!(outside.is_empty(), "{outside:#?}");
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    if lacks_repository() {
        return;
    }
    let summary = Document::read("docs/SUMMARY.md".as_ref());
    let listed: Vec<_> = summary.links.iter().map(|link| Path::new("docs").join(&link.text)).collect();
    let pages = read_directory("docs", true).into_iter().map(|page| page.path);
    let missing: Vec<_> =
        pages.filter(|page| !listed.contains(page) && page != Path::new("docs/SUMMARY.md")).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md lacks {missing:?}");
}
