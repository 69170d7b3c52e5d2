// Package utils is empty: nothing in the nerdctl binary uses it.
package utils
