-- What the service needs of the database and does not find, in words: tables and views with their columns, rights.
-- A test compares the columns with those that the migrations make.
with needed (name, columns, rights) as (
    values
        ('_yoyo_migration', '{migration_id}', '{select}'),
        ('users', '{id,created_at,project_id,env,domain,login,labels,secret}', '{select,insert,update,delete}'),
        ('pools', '{id,project_id,env,domain}', '{select,insert,update}'),
        ('locks', '{user_id,pool_id,fence,lock_id,ready_at,acquired_at,expires_at,ttl,holder,note,quarantine,
            client_id,session_until,last_outcome,bad_logins}', '{select,insert,update,delete}'),
        ('history', '{lock_id,user_id,fence,holder,note,acquired_at,ended_at,ended_by,outcome,client_id}',
            '{select,insert,delete}'),
        ('user_sessions', '{user_id,key_id,sealed,stored_at,ends_at}', '{select,insert,update,delete}'),
        ('user_codes', '{user_id,key_id,sealed,period,spent_until}', '{select,insert,update,delete}'),
        ('idempotency_keys', '{key,lock_ids,bound_at}', '{select,insert,delete}'),
        ('sealing_keys', '{id,proof}', '{select,insert,update}'),
        ('waiting', '{replica,told_at,queue}', '{select,insert,update,delete}'),
        ('clients', '{id,name,created_at,secret_hash,previous_hash,previous_until,scopes,projects}', '{select}'),
        ('token_requests', '{caller,since,requests,failures}', '{select,insert,update,delete}'),
        ('lock_states', '{user_id,state}', '{select}'),
        ('free_users', '{place,user_id}', '{select,update}')
),
found as (
    select name, columns::text[] as columns, rights::text[] as rights, to_regclass(quote_ident(name)) as relation
    from needed
)
select 'the table ' || name as lack
from found
where relation is null
union all
select 'the column ' || wanted || ' of ' || name
from found, unnest(columns) as wanted
where relation is not null
    and not exists (
        select
        from pg_attribute
        where attrelid = relation and attname = wanted and not attisdropped
    )
union all
select 'the right to ' || wanted || ' in ' || name || ' for the user ' || current_user
from found, unnest(rights) as wanted
where relation is not null and not has_table_privilege(relation, wanted)
union all
select 'the right to make temporary tables in ' || current_database() || ' for the user ' || current_user
where not has_database_privilege(current_database(), 'temporary')
