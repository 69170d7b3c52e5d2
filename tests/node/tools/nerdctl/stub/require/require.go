// Package require is empty: nothing in the nerdctl binary uses it.
package require
