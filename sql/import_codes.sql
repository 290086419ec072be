-- Store the secrets of one-time codes that the file has, and forget those that it takes out.
with gone as (
    update user_codes
    set key_id = null,
        sealed = null
    from pg_temp.import_rows
    where user_codes.user_id = import_rows.id
        and import_rows.has_codes
        and import_rows.code_sealed is null
)
insert into user_codes (user_id, key_id, sealed, period)
select id, code_key, code_sealed, code_period
from pg_temp.import_rows
where code_sealed is not null
order by id
on conflict (user_id) do update
set key_id = excluded.key_id,
    sealed = excluded.sealed,
    period = excluded.period
