/* Strings of a message that came in: valid UTF-8 wherever they are, and nothing else is touched. */
#include "tests/unit/rpc/probe.pb-c.h"
#include "transport/rpc/message_text.h"

#include <glib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define BAD "a\xff\xc3"
#define MENDED "a\xef\xbf\xbd\xef\xbf\xbd"

static Weft__Test__Number *arrived(const Weft__Test__Number *sent)
{
    const size_t size = weft__test__number__get_packed_size(sent);
    g_autofree uint8_t *bytes = g_malloc(size);
    weft__test__number__pack(sent, bytes);
    Weft__Test__Number *got = weft__test__number__unpack(NULL, size, bytes);
    message_text_mend(&got->base);
    return got;
}

static void every_string_is_mended(void **state)
{
    char *words[] = {(char *)"good", (char *)BAD, (char *)"ü"};
    Weft__Test__Number deep = WEFT__TEST__NUMBER__INIT, inside = WEFT__TEST__NUMBER__INIT,
                       one = WEFT__TEST__NUMBER__INIT, all = WEFT__TEST__NUMBER__INIT;
    deep.text = (char *)BAD;
    inside.inside = &deep;
    inside.either_case = WEFT__TEST__NUMBER__EITHER_LEFT;
    inside.left = (char *)BAD;
    one.n_words = G_N_ELEMENTS(words);
    one.words = words;
    Weft__Test__Number *more[] = {&one, &deep};
    all.inside = &inside;
    all.n_more = G_N_ELEMENTS(more);
    all.more = more;
    Weft__Test__Number *got = arrived(&all);
    assert_string_equal(got->text, "");
    assert_string_equal(got->inside->inside->text, MENDED);
    assert_string_equal(got->inside->left, MENDED);
    assert_string_equal(got->more[0]->words[0], "good");
    assert_string_equal(got->more[0]->words[1], MENDED);
    assert_string_equal(got->more[0]->words[2], "ü");
    assert_string_equal(got->more[1]->text, MENDED);
    weft__test__number__free_unpacked(got, NULL);
}

static void other_fields_are_as_they_came(void **state)
{
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = -7;
    number.payload.data = (uint8_t *)(char *)BAD;
    number.payload.len = strlen(BAD);
    number.either_case = WEFT__TEST__NUMBER__EITHER_RIGHT;
    number.right = INT64_C(0x7fffffffffffffff); /* shares its place with `left` */
    Weft__Test__Number *got = arrived(&number);
    assert_int_equal(got->value, -7);
    assert_int_equal(got->payload.len, strlen(BAD));
    assert_memory_equal(got->payload.data, BAD, strlen(BAD));
    assert_int_equal(got->right, INT64_C(0x7fffffffffffffff));
    assert_string_equal(got->text, "");
    weft__test__number__free_unpacked(got, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_string_is_mended),
        cmocka_unit_test(other_fields_are_as_they_came),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
