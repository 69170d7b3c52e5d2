//! Overlay options, made to fit what mount(2) reads.

use std::path::PathBuf;

/// mount(2) reads one page of options, and its last byte is the NUL.
pub const MAX_BYTES: usize = 4095;

/// Options as mount(2) takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// Where the mount must be made from, for paths in the options lead on from
    /// it; nothing when all are whole.
    pub directory: Option<PathBuf>,
    /// At most [`MAX_BYTES`].
    pub data: String,
}

/// Puts options together; if they are too long, with the lower layers' common
/// directory taken out.
///
/// # Errors
/// Their length, when even that does not make them short enough.
pub fn fit(options: &[&str]) -> Result<Fitted, usize> {
    let data = options.join(",");
    if data.len() <= MAX_BYTES {
        return Ok(Fitted {
            directory: None,
            data,
        });
    }
    let (directory, data) = shorten(options);
    if data.len() > MAX_BYTES {
        return Err(data.len());
    }
    Ok(Fitted {
        directory: Some(directory),
        data,
    })
}

fn shorten(options: &[&str]) -> (PathBuf, String) {
    let layers = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap_or_default();
    let common = common_directory(layers);
    let prefix = if common == "/" {
        "/".to_owned()
    } else {
        format!("{common}/")
    };
    // What is left of `/` is no path, and of `//x` another one: they stay whole.
    let relative = |layer: &str| match layer.strip_prefix(&prefix) {
        Some(rest) if !rest.is_empty() && !rest.starts_with('/') => rest.to_owned(),
        _ => layer.to_owned(),
    };
    let shortened: Vec<String> = options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(layers) => {
                let layers: Vec<String> = layers.split(':').map(relative).collect();
                format!("lowerdir={}", layers.join(":"))
            }
            None => (*option).to_owned(),
        })
        .collect();
    (PathBuf::from(common), shortened.join(","))
}

/// The longest directory that all layers lie in; `/` unless all are absolute
/// and none has an escaped colon, which only whole paths keep apart.
fn common_directory(layers: &str) -> &str {
    if layers.contains('\\') || layers.split(':').any(|layer| !layer.starts_with('/')) {
        return "/";
    }
    let parent = |layer: &'_ str| layer.rfind('/').unwrap_or(0);
    let mut all = layers.split(':');
    let first = all.next().unwrap_or("/");
    let mut common = &first[..parent(first)];
    for layer in all {
        // All lie in the root, `/` itself included.
        while !common.is_empty()
            && !layer
                .strip_prefix(common)
                .is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'))
        {
            common = &common[..parent(common)];
        }
    }
    if common.is_empty() { "/" } else { common }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn common_directory_of_layers_with_one_prefix_ends_at_a_component() {
        assert_eq!(common_directory("/a/10/fs:/a/11/fs"), "/a");
        assert_eq!(common_directory("/a/1:/a/11"), "/a");
        assert_eq!(common_directory("/a:/b"), "/");
        assert_eq!(common_directory("/a:/a"), "/");
        assert_eq!(common_directory("relative:/a"), "/");
        assert_eq!(common_directory("/a/x\\:y:/a/z"), "/");
        assert_eq!(common_directory("/a/b:/a"), "/");
    }

    #[test]
    fn common_directory_with_the_root_among_the_layers_is_the_root() {
        assert_eq!(common_directory("/a:/"), "/");
        assert_eq!(common_directory("/:/a"), "/");
        assert_eq!(shorten(&["lowerdir=/a:/"]).1, "lowerdir=a:/");
    }

    #[test]
    fn shorten_keeps_what_would_become_another_path() {
        let (directory, data) = shorten(&["lowerdir=/a/x:/a//y"]);
        assert_eq!(directory, PathBuf::from("/a"));
        assert_eq!(data, "lowerdir=x:/a//y");
    }

    proptest! {
        #[test]
        fn shorten_of_any_layers_names_the_same_directories(
            layers in proptest::collection::vec("(/[ab]{0,2}){1,4}", 1..6)
        ) {
            let option = format!("lowerdir={}", layers.join(":"));
            let (directory, short) = shorten(&[&option]);
            let short = short.strip_prefix("lowerdir=").expect("is kept");
            let whole: Vec<_> = short.split(':').map(|layer| directory.join(layer)).collect();
            let expected: Vec<_> = layers.iter().map(PathBuf::from).collect();
            prop_assert_eq!(whole, expected);
            prop_assert!(short.split(':').all(|layer| !layer.is_empty()));
        }
    }
}
