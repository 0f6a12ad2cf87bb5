/* The outline of a JSON text, for x86-64: 64 bytes at a time, where a decoder looks at each for itself. What it is for, and
   what becomes of its result: decode.py. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <emmintrin.h>
#include <stdint.h>
#include <string.h>

#define KEPT 2048 /* bytes of a string that stay: more than any limit on the length of one */
#define BLOCK 64
#define ENOUGH 64 /* strings, after which it must have been worth it */

typedef const unsigned char *Place;

static inline __m128i special(Place at) { /* the sign bit of each byte that is not plain */
    __m128i c = _mm_loadu_si128((const __m128i *)at);
    __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(c, _mm_set1_epi8(0x1f)), c);
    __m128i quote = _mm_cmpeq_epi8(c, _mm_set1_epi8('"'));
    __m128i escape = _mm_cmpeq_epi8(c, _mm_set1_epi8('\\'));
    return _mm_or_si128(_mm_or_si128(c, control), _mm_or_si128(quote, escape));
}

/* A bit for each of the BLOCK bytes at a place that is a quote, a backslash, a control character or not ASCII. */
static inline uint64_t specials(Place at) {
    __m128i a = special(at), b = special(at + 16), c = special(at + 32), d = special(at + 48);
    if (!_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d)))) return 0;
    return (uint64_t)_mm_movemask_epi8(a) | (uint64_t)_mm_movemask_epi8(b) << 16 |
           (uint64_t)_mm_movemask_epi8(c) << 32 | (uint64_t)_mm_movemask_epi8(d) << 48;
}

static int is_hexadecimal(unsigned char c) {
    return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f');
}

/* The end of the escape at a backslash; NULL where it is none, or a surrogate. */
static Place escape(Place at, Place end) {
    if (end - at < 2) return NULL;
    switch (at[1]) {
    case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
        return at + 2;
    case 'u':
        if (end - at < 6) return NULL;
        for (int i = 2; i < 6; i++)
            if (!is_hexadecimal(at[i])) return NULL;
        return (at[2] | 0x20) == 'd' && at[3] > '7' ? NULL : at + 6;
    }
    return NULL;
}

/* The end of the character that begins with a byte of 0x80 or more; NULL where that is not UTF-8. */
static Place character(Place at, Place end) {
    unsigned char c = at[0];
    int size = c >= 0xc2 && c < 0xe0 ? 2 : (c & 0xf0) == 0xe0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 0;
    if (!size || end - at < size) return NULL;
    for (int i = 1; i < size; i++)
        if ((at[i] & 0xc0) != 0x80) return NULL;
    if ((c == 0xe0 && at[1] < 0xa0) || (c == 0xed && at[1] > 0x9f)) return NULL; /* too long, a surrogate */
    if ((c == 0xf0 && at[1] < 0x90) || (c == 0xf4 && at[1] > 0x8f)) return NULL; /* too long, beyond Unicode */
    return at + size;
}

/* The end of the special character that a string holds at a place; NULL where it is not valid there. */
static Place behind(Place at, Place end) {
    return *at == '\\' ? escape(at, end) : *at >= 0x80 ? character(at, end) : NULL;
}

/* The closing quote of the string that begins at a place; NULL where there is none, or something in it is not valid.
   *kept is where it may be cut: between two characters. */
static Place closing(Place at, Place end, Place *kept) {
    Place begin = at, last = at, found = NULL; /* last: all that follows is plain, as far as we have seen */
    *kept = NULL;
    for (Place next; end - at >= BLOCK; at = next) {
        next = at + BLOCK;
        for (uint64_t mask = specials(at); mask; mask &= ~(uint64_t)0 << (last - at)) {
            found = at + __builtin_ctzll(mask);
            if (!*kept && found - begin >= KEPT) *kept = last - begin > KEPT ? last : begin + KEPT;
            if (*found == '"') return found;
            last = behind(found, end);
            if (!last) return NULL;
            if (last >= next) {
                next = last;
                break;
            }
        }
    }
    while (at < end && *at != '"') {
        if (*at >= 0x20 && *at < 0x80 && *at != '\\') at++;
        else if (!(at = last = behind(at, end))) return NULL;
    }
    if (!*kept && at - begin >= KEPT) *kept = last - begin > KEPT ? last : begin + KEPT;
    return at < end ? at : NULL;
}

static PyObject *outline(PyObject *self, PyObject *body) {
    char *data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(body, &data, &size) < 0) return NULL;
    PyObject *found = PyBytes_FromStringAndSize(NULL, size);
    if (!found) return NULL;
    char *begin = PyBytes_AS_STRING(found), *out = begin;
    Place at = (Place)data, end = at + size, kept;
    for (int strings = 0; at < end; strings++) {
        Place open = memchr(at, '"', end - at);
        Place next = open ? open + 1 : end;
        memcpy(out, at, next - at);
        out += next - at;
        at = next;
        if (!open) break;
        Place close = closing(at, end, &kept);
        if (!close || (strings == ENOUGH && 2 * (out - begin) > (Py_ssize_t)(at - (Place)data))) {
            Py_DECREF(found);
            Py_RETURN_NONE;
        }
        if (!kept) kept = close;
        memcpy(out, at, kept - at);
        out += kept - at;
        at = close;
        *out++ = *at++;
    }
    _PyBytes_Resize(&found, out - begin);
    return found;
}

static PyMethodDef methods[] = {
    {"outline", outline, METH_O,
     "outline(body: bytes) -> bytes | None\n\nThe JSON text with its long strings cut short; None where that is not "
     "worth it, or a string is not valid."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_outline", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__outline(void) { return PyModule_Create(&module); }
