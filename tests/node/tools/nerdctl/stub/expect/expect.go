// Package expect is empty: nothing in the nerdctl binary uses it.
package expect
