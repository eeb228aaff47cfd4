#include <stdio.h>
#include <stdlib.h>
#include "sum.h"
int main(int n, char **v) { printf("%d\n", sum(atoi(v[1]), atoi(v[2]))); return 0; }
