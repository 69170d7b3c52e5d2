// Package tig stands in for a package that nerdctl's go.mod replaces by a folder of its own repository, which the module
// proxy does not serve. nerdctl's binary needs no more than the names below to compile.
package tig

// T is the part of testing.T that nerdctl's packages name.
type T interface {
	Helper()
	FailNow()
	Fail()
	Log(args ...any)
	Name() string
	TempDir() string
}
