//! Text that the guest has a hand in, for a user's terminal.

/// Most of it that is told.
pub const MAX_BYTES: usize = 4096;

/// What cannot move a terminal's cursor or hide other text: whoever reads an
/// error did not choose to run what the guest prints. Names in any script stay.
pub fn printable(text: &str) -> String {
    let shown = text.chars().map(|character| match character {
        '\t' | '\n' => ' ',
        ' '..='~' => character,
        // Neither controls nor what reverses or hides text.
        other if other.is_alphanumeric() => other,
        _ => '?',
    });
    let mut printable = String::new();
    for character in shown {
        if printable.len() + character.len_utf8() > MAX_BYTES {
            break;
        }
        printable.push(character);
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn printable_of_an_escape_sequence_is_harmless_text() {
        assert_eq!(
            printable("\x1b[2Jgr\u{fc}n\r\u{202e}x\n"),
            "?[2Jgr\u{fc}n??x "
        );
    }

    proptest! {
        #[test]
        fn printable_of_any_text_is_bounded_and_without_controls(text in ".{0,40}", times in 1..200_usize) {
            let shown = printable(&text.repeat(times));
            prop_assert!(shown.len() <= MAX_BYTES && !shown.contains(char::is_control));
        }
    }
}
