//! Each row of docs/crash-order.md names the tests that turn the power off there, and they exist.

use std::fs;
use std::path::Path;

const DOCUMENT: &str = include_str!("../../docs/crash-order.md");
/// What the heading of every table ends with.
const LAST_COLUMN: &str = "| test |";

/// `file: function` in a piece of text.
fn references(text: &str) -> Vec<(&str, &str)> {
    text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(": ")).filter(|(file, _)| file.ends_with(".rs")).collect()
}

/// Why a reference names no test, if it does not.
fn wrong((file, function): (&str, &str)) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let Ok(source) = fs::read_to_string(path) else { return Some(format!("{file} cannot be read")) };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    // A property takes arguments, and neither needs to be the line below its attribute.
    let Some(at) = lines.iter().position(|line| line.starts_with(&format!("fn {function}("))) else {
        return Some(format!("{file} has no function {function}"));
    };
    let attributes = lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    let is_test = attributes.clone().any(|line| *line == "#[test]") && !attributes.clone().any(|line| line.starts_with("#[ignore"));
    (!is_test).then(|| format!("{function} in {file} is no test that runs"))
}

/// What is wrong with the tables of a document.
fn complaints(document: &str) -> Vec<String> {
    let mut complaints: Vec<String> = references(document).into_iter().filter_map(wrong).collect();
    let mut lines = document.lines().peekable();
    while let Some(heading) = lines.next() {
        if lines.next_if(|line| line.starts_with("|---")).is_none() {
            continue;
        }
        if !heading.ends_with(LAST_COLUMN) {
            complaints.push(format!("the table {heading} has no column for tests"));
        }
        while let Some(row) = lines.next_if(|line| line.starts_with('|')) {
            let last = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
            if references(last).is_empty() {
                complaints.push(format!("no test in {row}"));
            }
        }
    }
    complaints
}

#[test]
fn each_row_of_the_crash_order_names_tests_that_exist() {
    let rows = DOCUMENT.lines().filter(|line| line.starts_with("| ")).count();
    assert!(rows > 60, "the tables have {rows} rows");
    let complaints = complaints(DOCUMENT);
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn rows_without_a_test_are_found() {
    let table = |cell: &str| format!("| crash here | test |\n|---|---|\n| anywhere | {cell} |\n");
    let this = "tests/tests/crash_order.rs";
    assert_eq!(complaints(&table(&format!("`{this}: rows_without_a_test_are_found`"))), Vec::<String>::new());
    for cell in ["", "`main.rs`", "`nowhere.rs: a`", &format!("`{this}: no_such_test`"), &format!("`{this}: references`")] {
        assert_eq!(complaints(&table(cell)).len(), 1, "{cell}");
    }
    assert_eq!(complaints("| a | b |\n|---|---|\n").len(), 1);
}
