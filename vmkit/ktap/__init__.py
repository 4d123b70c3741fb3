"""vmkit.ktap: reads the test results that a kernel prints (KTAP, kselftest, KUnit, TAP), also when they break off."""
